//! A pack's weights where they lie: checked before they are lent.
//!
//! **Invariant:** what was looked at while somebody wanted to change the file counts for nothing: then the
//! weights are copied, and what is copied is checked again.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use cairn_artifacts::LeasedFile;
use cairn_artifacts::leanpack::{PackError, TensorEntry};
use cairn_kernels::{Cpu, Encoding, Weight};

use super::{Form, PackSource, form_of, told};
use crate::load::LoadError;

/// Panels whose lists a thread checks at a time.
const LIST_PANELS: usize = 128;

impl PackSource {
    /// Compares every chunk of mapped weights with its hash; `false` if somebody wants to change the file
    /// before that is done, whose turn it is then.
    pub(super) fn check_mapped(&self, mapped: &LeasedFile, cpu: &Cpu) -> Result<bool, LoadError> {
        let chunks = |tensor: &TensorEntry| tensor.chunks.len();
        let chunks = self.parts_of_tensors(chunks, 1);
        self.check_parts(&chunks, mapped, cpu, |tensor, chunk| {
            let checked = self.pack.check_chunk(tensor, chunk.start, mapped.bytes());
            checked.map_err(|error: PackError| told(&error))
        })
    }

    /// Checks the lists of exceptions of mapped weights; as [`check_mapped`](Self::check_mapped).
    pub(super) fn check_lists(&self, mapped: &LeasedFile, cpu: &Cpu) -> Result<bool, LoadError> {
        let panels = self.parts_of_tensors(|tensor| list_panels(form_of(tensor).ok()), LIST_PANELS);
        self.check_parts(&panels, mapped, cpu, |tensor, panels| {
            let form = form_of(tensor).map_err(|kind| kind.to_string())?;
            let [offset, bytes] =
                [tensor.offset, tensor.bytes].map(|x| usize::try_from(x).unwrap_or(usize::MAX));
            check_list_panels(form, &mapped.bytes()[offset..][..bytes], panels)
        })
    }

    /// Checks the lists of exceptions of one weight.
    pub(super) fn check_own_lists(form: Form, bytes: &[u8], cpu: &Cpu) -> Result<(), String> {
        let panels = list_panels(Some(form));
        let failure: Mutex<Option<(usize, String)>> = Mutex::new(None);
        cpu.parallel(panels.div_ceil(LIST_PANELS), |task, _| {
            let first = task * LIST_PANELS;
            let checked = check_list_panels(form, bytes, first..panels.min(first + LIST_PANELS));
            keep_first(&failure, task, checked);
        });
        failure.into_inner().ok().flatten().map_or(Ok(()), |(_, problem)| Err(problem))
    }

    /// The parts of all tensors, so many at a time: each with its tensor.
    fn parts_of_tensors(
        &self,
        count: impl Fn(&TensorEntry) -> usize,
        at_a_time: usize,
    ) -> Vec<(usize, Range<usize>)> {
        let tensors = self.pack.header().tensors.iter().enumerate();
        let parts = tensors.flat_map(|(index, tensor)| {
            let count = count(tensor);
            let firsts = (0..count).step_by(at_a_time);
            firsts.map(move |first| (index, first..count.min(first + at_a_time)))
        });
        parts.collect()
    }

    /// Checks parts of mapped weights by all threads; of several failures the first is told, whichever was
    /// found first. `false` if somebody wants to change the file before that is done.
    fn check_parts(
        &self,
        parts: &[(usize, Range<usize>)],
        mapped: &LeasedFile,
        cpu: &Cpu,
        check: impl Fn(&TensorEntry, Range<usize>) -> Result<(), String> + Sync,
    ) -> Result<bool, LoadError> {
        let tensors = &self.pack.header().tensors;
        let failure: Mutex<Option<(usize, String)>> = Mutex::new(None);
        let is_wanted = AtomicBool::new(false);
        cpu.parallel(parts.len(), |task, _| {
            if is_wanted.load(Ordering::Relaxed) || !mapped.holds() {
                is_wanted.store(true, Ordering::Relaxed);
                return;
            }
            let (tensor, part) = &parts[task];
            keep_first(&failure, task, check(&tensors[*tensor], part.clone()));
        });
        // What was looked at meanwhile may be what somebody is writing.
        if is_wanted.into_inner() || !mapped.holds() {
            return Ok(false);
        }
        let Some((task, problem)) = failure.into_inner().ok().flatten() else { return Ok(true) };
        Err(LoadError::Unreadable { name: tensors[parts[task].0].name.clone(), problem })
    }
}

/// Keeps the failure of the first task.
fn keep_first(failure: &Mutex<Option<(usize, String)>>, task: usize, checked: Result<(), String>) {
    if let (Err(problem), Ok(mut failure)) = (checked, failure.lock())
        && failure.as_ref().is_none_or(|(before, _)| task < *before)
    {
        *failure = Some((task, problem));
    }
}

/// Panels with a list of exceptions.
fn list_panels(form: Option<Form>) -> usize {
    match form {
        Some(Form { encoding: Encoding::Bf16z, rows, .. }) => rows.div_ceil(super::PANEL_ROWS),
        _ => 0,
    }
}

fn check_list_panels(form: Form, bytes: &[u8], panels: Range<usize>) -> Result<(), String> {
    let Form { encoding, layout, rows: n, columns: k } = form;
    let weight = Weight { encoding, layout, n, k, bytes };
    weight.check_lists(panels).map_err(|damaged| damaged.to_string())
}
