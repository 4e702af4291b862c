//! Regions of memory and spans in them: what a plan's offsets point into.
//!
//! A plan never holds pointers; it holds [`Span`]s. [`Memory`] owns the regions (anonymous memory,
//! touched when it is added, or what somebody else keeps and lends for reading) and hands out slices.
//! **Invariant:** two
//! slices handed out together never overlap if one of them can be written; [`Memory::split`] checks.

use std::marker::PhantomData;
use std::sync::Mutex;

use memmap2::{Advice, MmapMut, MmapOptions};

use crate::cpu::Cpu;

/// Offsets of spans that are written are multiples of this, so that every vector load of a row start is
/// aligned. What is lent lies as it lies, aligned to its elements.
pub const ALIGNMENT: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;
/// What one thread touches at a time: several huge pages.
const TOUCH_BYTES: usize = 4 * HUGE_PAGE;

/// A range of bytes in one region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Span {
    /// Which region of the [`Memory`].
    pub region: u16,
    /// First byte, a multiple of [`ALIGNMENT`] where it is written.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

impl Span {
    /// Whether two spans share a byte.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.region == other.region
            && self.bytes > 0
            && other.bytes > 0
            && self.offset < other.offset + other.bytes
            && other.offset < self.offset + self.bytes
    }
}

/// Memory that the system did not give.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The system refused an anonymous mapping.
    #[error("the system refused {bytes} bytes of memory")]
    Refused {
        /// Bytes asked for.
        bytes: usize,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// What was lent has changed and cannot be read any more.
    #[error("what was read in place is not there any more")]
    Withdrawn(#[source] std::io::Error),
    /// More regions than a [`Span`] can name.
    #[error("a memory holds at most {limit} regions")]
    TooManyRegions {
        /// The most regions there can be.
        limit: usize,
    },
}

/// An anonymous mapping whose first byte lies on a huge page.
#[derive(Debug)]
pub(crate) struct Anonymous {
    map: MmapMut,
    start: usize,
    bytes: usize,
}

impl Anonymous {
    /// Maps and touches `bytes`. Whole 2 MiB pages inside are asked for as huge pages, the rest is
    /// 4 KiB pages, so that no more than `bytes` (rounded up to a page) ever becomes resident.
    pub(crate) fn new(bytes: usize) -> Result<Self, MemoryError> {
        let mut region = Self::untouched(bytes)?;
        region.as_mut().iter_mut().step_by(PAGE).for_each(touch);
        Ok(region)
    }

    /// As [`new`](Self::new), touched from byte `first` on, by all threads: the system clears pages
    /// as fast as memory is written.
    pub(crate) fn new_parallel(bytes: usize, first: usize, cpu: &Cpu) -> Result<Self, MemoryError> {
        let mut region = Self::untouched(bytes)?;
        cpu.parallel_chunks(&mut region.as_mut()[first..], TOUCH_BYTES, |_, chunk, _| {
            chunk.iter_mut().step_by(PAGE).for_each(touch);
        });
        Ok(region)
    }

    fn untouched(bytes: usize) -> Result<Self, MemoryError> {
        let refused = |source| MemoryError::Refused { bytes, source };
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let map_bytes = bytes.next_multiple_of(PAGE).max(PAGE) + slack;
        let map = MmapOptions::new().len(map_bytes).map_anon().map_err(refused)?;
        let base = map.as_ptr() as usize;
        let start = if slack > 0 { base.next_multiple_of(HUGE_PAGE) - base } else { 0 };
        let region = Self { map, start, bytes };
        let huge_bytes = bytes / HUGE_PAGE * HUGE_PAGE;
        if huge_bytes > 0 {
            // Advice only: a kernel without huge pages serves the same bytes from small ones.
            let _unsupported = region.map.advise_range(Advice::HugePage, start, huge_bytes);
        }
        Ok(region)
    }

    pub(crate) fn as_ref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.bytes]
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.bytes]
    }
}

/// A volatile-strength write: the compiler must not see that the page is zero already.
fn touch(byte: &mut u8) {
    *byte = std::hint::black_box(0);
}

/// Memory for reading that somebody else keeps, such as a mapped file, and may ask back.
pub trait Lent: std::fmt::Debug + Send + Sync {
    /// The bytes; to be read only while they [`stay`](Self::stays).
    fn bytes(&self) -> &[u8];

    /// Whether the bytes stay what they are, for many seconds from now at least.
    fn stays(&self) -> bool;

    /// Copies bytes from `first` on, also where they do not stay.
    ///
    /// # Errors
    /// What the system says where they are gone.
    fn copy(&self, first: usize, out: &mut [u8]) -> std::io::Result<()>;

    /// Checks that what has been copied is what was lent.
    ///
    /// # Errors
    /// Says what became of it.
    fn check_copied(&self) -> std::io::Result<()>;
}

#[derive(Debug)]
enum Region {
    Owned(Anonymous),
    Lent(Box<dyn Lent>),
}

/// A copy of memory that is asked back.
fn copied(lent: &dyn Lent, cpu: &Cpu) -> Result<Anonymous, MemoryError> {
    let mut copy = Anonymous::untouched(lent.bytes().len())?;
    let failure = Mutex::new(None);
    cpu.parallel_chunks(copy.as_mut(), TOUCH_BYTES, |first, out, _| {
        if let (Err(error), Ok(mut failure)) = (lent.copy(first, out), failure.lock()) {
            failure.get_or_insert(error);
        }
    });
    let failure = failure.into_inner().ok().flatten();
    failure.map_or_else(|| lent.check_copied(), Err).map_err(MemoryError::Withdrawn)?;
    Ok(copy)
}

/// The regions that spans point into.
#[derive(Debug, Default)]
pub struct Memory {
    regions: Vec<Region>,
}

impl Memory {
    /// A memory without regions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a region of `bytes` zeros, resident from now on; the threads of `cpu` touch it.
    ///
    /// # Errors
    /// [`MemoryError::Refused`] if the system does not give the memory,
    /// [`MemoryError::TooManyRegions`] after 65535 regions.
    pub fn add_owned(&mut self, bytes: usize, cpu: &Cpu) -> Result<u16, MemoryError> {
        self.add_to_be_filled(bytes, 0, cpu)
    }

    /// Adds a region of `bytes` zeros whose pages become resident when they are written.
    ///
    /// # Errors
    /// As [`add_owned`](Self::add_owned).
    pub fn add_untouched(&mut self, bytes: usize) -> Result<u16, MemoryError> {
        let id = self.next_id()?;
        self.regions.push(Region::Owned(Anonymous::untouched(bytes)?));
        Ok(id)
    }

    /// As [`add_owned`](Self::add_owned), but the first `first` bytes are left to whoever fills them at
    /// once: clearing a page just before it is written costs less than clearing all of them before.
    ///
    /// # Errors
    /// As [`add_owned`](Self::add_owned).
    ///
    /// # Panics
    /// If `first` is more than `bytes`.
    pub fn add_to_be_filled(
        &mut self,
        bytes: usize,
        first: usize,
        cpu: &Cpu,
    ) -> Result<u16, MemoryError> {
        let id = self.next_id()?;
        self.regions.push(Region::Owned(Anonymous::new_parallel(bytes, first, cpu)?));
        Ok(id)
    }

    /// Adds what somebody lends as a read-only region.
    ///
    /// # Errors
    /// [`MemoryError::TooManyRegions`] after 65535 regions.
    pub fn add_lent(&mut self, lent: Box<dyn Lent>) -> Result<u16, MemoryError> {
        let id = self.next_id()?;
        self.regions.push(Region::Lent(lent));
        Ok(id)
    }

    /// Sees to it that what was lent can be read for the next seconds: what is asked back is copied,
    /// by all threads, into memory of this one's own. Nearly always there is nothing to do, and
    /// nothing is allocated.
    ///
    /// # Errors
    /// [`MemoryError::Withdrawn`] if it is not what it was any more, [`MemoryError::Refused`] if there
    /// is no memory for a copy.
    pub fn keep_lent(&mut self, cpu: &Cpu) -> Result<(), MemoryError> {
        for region in &mut self.regions {
            if let Region::Lent(lent) = region
                && !lent.stays()
            {
                *region = Region::Owned(copied(&**lent, cpu)?);
            }
        }
        Ok(())
    }

    /// Whether somebody else keeps a region.
    pub fn is_lent(&self, region: u16) -> bool {
        matches!(self.regions[usize::from(region)], Region::Lent(_))
    }

    /// Bytes of regions that somebody else keeps.
    pub fn lent_bytes(&self) -> usize {
        let lent = |region: &Region| match region {
            Region::Owned(_) => 0,
            Region::Lent(lent) => lent.bytes().len(),
        };
        self.regions.iter().map(lent).sum()
    }

    fn next_id(&self) -> Result<u16, MemoryError> {
        let limit = usize::from(u16::MAX);
        u16::try_from(self.regions.len()).map_err(|_| MemoryError::TooManyRegions { limit })
    }

    /// Bytes of anonymous memory that this holds, resident once it was written.
    pub fn owned_bytes(&self) -> usize {
        let owned = |region: &Region| match region {
            Region::Owned(region) => region.bytes,
            Region::Lent(_) => 0,
        };
        self.regions.iter().map(owned).sum()
    }

    /// Length of a region in bytes.
    pub fn region_bytes(&self, region: u16) -> usize {
        self.region(region).len()
    }

    fn region(&self, region: u16) -> &[u8] {
        match &self.regions[usize::from(region)] {
            Region::Owned(region) => region.as_ref(),
            Region::Lent(lent) => lent.bytes(),
        }
    }

    /// The bytes of one span.
    pub fn read(&self, span: Span) -> Bytes<'_> {
        if span.bytes == 0 {
            return Bytes(&[]);
        }
        Bytes(&self.region(span.region)[span.offset..span.offset + span.bytes])
    }

    /// The bytes of one span of an owned region, to be written.
    pub fn write(&mut self, span: Span) -> BytesMut<'_> {
        let ([], [bytes]) = self.split([], [span]);
        bytes
    }

    /// The bytes of several spans at once.
    ///
    /// # Panics
    /// If a written span overlaps any other, lies in what was lent, or a span leaves its region:
    /// those are broken invariants of a plan, not input. Empty spans overlap nothing.
    pub fn split<const R: usize, const W: usize>(
        &mut self,
        reads: [Span; R],
        writes: [Span; W],
    ) -> ([Bytes<'_>; R], [BytesMut<'_>; W]) {
        for (i, write) in writes.iter().enumerate() {
            let others = reads.iter().chain(&writes[i + 1..]);
            for other in others {
                assert!(!write.overlaps(other), "written span {write:?} overlaps {other:?}");
            }
        }
        let written = writes.map(|span| self.raw_mut(span));
        let read = reads.map(|span| self.raw(span));
        (read, written)
    }

    fn raw<'a>(&self, span: Span) -> Bytes<'a> {
        let bytes = self.read(span).0;
        // SAFETY: the pointer and length come from a live slice. The lifetime is widened to the
        // one `split` returns, which borrows `self` mutably, and no written span overlaps it.
        Bytes(unsafe { std::slice::from_raw_parts(bytes.as_ptr(), bytes.len()) })
    }

    fn raw_mut<'a>(&mut self, span: Span) -> BytesMut<'a> {
        check_alignment(span);
        if span.bytes == 0 {
            return BytesMut(&mut []);
        }
        let bytes = match &mut self.regions[usize::from(span.region)] {
            Region::Owned(region) => &mut region.as_mut()[span.offset..span.offset + span.bytes],
            Region::Lent(_) => panic!("span {span:?} was lent for reading"),
        };
        // SAFETY: as in `raw`; `split` checked that no other handed-out span overlaps this one.
        BytesMut(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr(), bytes.len()) })
    }
}

fn check_alignment(span: Span) {
    assert!(span.offset.is_multiple_of(ALIGNMENT), "span {span:?} is not {ALIGNMENT}-byte aligned");
}

/// A number type that any bytes are a valid value of.
///
/// Private to the crate's views: implementing it for a type with padding or niches is wrong.
trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f64 {}
impl Plain for i8 {}

fn view<T: Plain>(bytes: &[u8]) -> &[T] {
    let size = size_of::<T>();
    if bytes.is_empty() {
        return &[];
    }
    assert!((bytes.as_ptr() as usize).is_multiple_of(align_of::<T>()), "misaligned view");
    assert!(bytes.len().is_multiple_of(size), "{} bytes are not whole elements", bytes.len());
    // SAFETY: aligned and a whole number of elements (asserted); any bytes are a valid `Plain`.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size) }
}

fn view_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    let size = size_of::<T>();
    if bytes.is_empty() {
        return &mut [];
    }
    assert!((bytes.as_ptr() as usize).is_multiple_of(align_of::<T>()), "misaligned view");
    assert!(bytes.len().is_multiple_of(size), "{} bytes are not whole elements", bytes.len());
    // SAFETY: aligned and a whole number of elements (asserted); any bytes are a valid `Plain`,
    // and the exclusive borrow passes on.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size) }
}

/// Bytes to read, viewed as numbers.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    /// Wraps bytes that were not handed out by a [`Memory`].
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The bytes themselves.
    pub fn u8s(self) -> &'a [u8] {
        self.0
    }

    /// As 32-bit floats.
    pub fn f32s(self) -> &'a [f32] {
        view(self.0)
    }

    /// As 64-bit floats.
    pub fn f64s(self) -> &'a [f64] {
        view(self.0)
    }

    /// As 16-bit words, for instance bf16 bits.
    pub fn u16s(self) -> &'a [u16] {
        view(self.0)
    }

    /// As 32-bit words, for instance token ids.
    pub fn u32s(self) -> &'a [u32] {
        view(self.0)
    }

    /// As signed bytes.
    pub fn i8s(self) -> &'a [i8] {
        view(self.0)
    }
}

/// Bytes to write, viewed as numbers.
#[derive(Debug)]
pub struct BytesMut<'a>(&'a mut [u8]);

impl<'a> BytesMut<'a> {
    /// Wraps bytes that were not handed out by a [`Memory`].
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self(bytes)
    }

    /// The bytes themselves.
    pub fn u8s(self) -> &'a mut [u8] {
        self.0
    }

    /// As 32-bit floats.
    pub fn f32s(self) -> &'a mut [f32] {
        view_mut(self.0)
    }

    /// As 64-bit floats.
    pub fn f64s(self) -> &'a mut [f64] {
        view_mut(self.0)
    }

    /// As 16-bit words, for instance bf16 bits.
    pub fn u16s(self) -> &'a mut [u16] {
        view_mut(self.0)
    }

    /// As 32-bit words.
    pub fn u32s(self) -> &'a mut [u32] {
        view_mut(self.0)
    }

    /// As signed bytes.
    pub fn i8s(self) -> &'a mut [i8] {
        view_mut(self.0)
    }

    /// The same bytes for a shorter while.
    pub fn reborrow(&mut self) -> BytesMut<'_> {
        BytesMut(self.0)
    }
}

/// Borrowed floats as bytes, for a [`Weight`](crate::Weight) over a plain slice.
pub fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: floats have no padding, so their memory is initialised bytes of that length.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Borrowed floats as bytes to be written, for instance by [`encode`](crate::encoding::encode).
pub fn bytes_of_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; any bytes are valid floats, and the exclusive borrow passes on.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Memory that can be cut into mutable float slices: what a [`Scratch`](crate::Scratch) holds.
#[derive(Debug)]
pub(crate) struct Arena {
    region: Anonymous,
    _not_shared: PhantomData<*mut u8>,
}

// SAFETY: the arena owns its mapping; `PhantomData<*mut u8>` only keeps it from being `Sync`.
unsafe impl Send for Arena {}

impl Arena {
    pub(crate) fn new(bytes: usize) -> Result<Self, MemoryError> {
        Ok(Self { region: Anonymous::new(bytes)?, _not_shared: PhantomData })
    }

    pub(crate) fn f32s(&mut self) -> &mut [f32] {
        view_mut(self.region.as_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(region: u16, offset: usize, bytes: usize) -> Span {
        Span { region, offset, bytes }
    }

    #[test]
    fn split_hands_out_disjoint_spans() {
        let mut memory = Memory::new();
        let region = memory.add_owned(4096, &Cpu::detect(1)).unwrap();
        memory.write(span(region, 0, 8)).f32s().copy_from_slice(&[1.0, 2.0]);
        let ([a, b], [c]) =
            memory.split([span(region, 0, 8), span(region, 0, 4)], [span(region, 64, 8)]);
        c.f32s().copy_from_slice(a.f32s());
        assert_eq!(b.f32s(), [1.0]);
        assert_eq!(memory.read(span(region, 64, 8)).f32s(), [1.0, 2.0]);
    }

    #[test]
    fn written_overlaps_are_refused() {
        let attempt = |reads: [Span; 1], writes: [Span; 2]| {
            let mut memory = Memory::new();
            memory.add_owned(4096, &Cpu::detect(1)).unwrap();
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let _spans = memory.split(reads, writes);
            }))
            .is_ok()
        };
        assert!(attempt([span(0, 0, 64)], [span(0, 64, 64), span(0, 128, 64)]));
        assert!(attempt([span(0, 64, 0)], [span(0, 64, 64), span(0, 64, 0)]), "empty spans");
        assert!(!attempt([span(0, 0, 65)], [span(0, 64, 64), span(0, 128, 64)]), "read and write");
        assert!(!attempt([span(0, 0, 64)], [span(0, 64, 65), span(0, 128, 64)]), "two writes");
        assert!(!attempt([span(0, 0, 4)], [span(0, 96, 4), span(0, 128, 4)]), "unaligned");
        assert!(!attempt([span(0, 0, 4)], [span(0, 64, 4), span(0, 4032, 65)]), "past the end");
    }

    /// Twos, until they are asked back; then a copy can be had if `copies`.
    #[derive(Debug)]
    struct Twos {
        bytes: Vec<u8>,
        stays: std::sync::Arc<std::sync::atomic::AtomicBool>,
        copies: bool,
    }

    impl Lent for Twos {
        fn bytes(&self) -> &[u8] {
            &self.bytes
        }

        fn stays(&self) -> bool {
            self.stays.load(std::sync::atomic::Ordering::Relaxed)
        }

        fn copy(&self, first: usize, out: &mut [u8]) -> std::io::Result<()> {
            out.copy_from_slice(&self.bytes[first..first + out.len()]);
            Ok(())
        }

        fn check_copied(&self) -> std::io::Result<()> {
            let gone = || Err(std::io::Error::from(std::io::ErrorKind::InvalidData));
            if self.copies { Ok(()) } else { gone() }
        }
    }

    #[test]
    fn what_is_asked_back_is_copied_or_an_error() {
        for copies in [true, false] {
            let cpu = Cpu::detect(2);
            let stays = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
            let bytes = vec![2; 2 * TOUCH_BYTES + 100];
            let (count, lent) = (bytes.len(), Twos { bytes, stays: stays.clone(), copies });
            let mut memory = Memory::new();
            let region = memory.add_lent(Box::new(lent)).unwrap();
            memory.keep_lent(&cpu).unwrap();
            assert_eq!((memory.owned_bytes(), memory.lent_bytes()), (0, count));
            let all = span(region, 0, count);
            let before = memory.read(all).u8s().as_ptr();
            stays.store(false, std::sync::atomic::Ordering::Relaxed);
            let kept = memory.keep_lent(&cpu);
            assert_eq!(kept.is_ok(), copies, "{kept:?}");
            if copies {
                assert!(memory.read(all).u8s().iter().all(|&byte| byte == 2));
                assert_ne!(memory.read(all).u8s().as_ptr(), before);
                assert_eq!((memory.owned_bytes(), memory.lent_bytes()), (count, 0));
            }
        }
    }

    #[test]
    fn regions_are_zero_and_counted() {
        let mut memory = Memory::new();
        let bytes = 5 << 20;
        let region = memory.add_owned(bytes, &Cpu::detect(2)).unwrap();
        let all = memory.read(span(region, 0, bytes));
        assert!(all.u8s().iter().all(|&byte| byte == 0));
        assert!((all.u8s().as_ptr() as usize).is_multiple_of(HUGE_PAGE));
        assert_eq!(memory.owned_bytes(), bytes);
        assert_eq!(memory.add_owned(0, &Cpu::detect(1)).unwrap(), 1);
    }
}
