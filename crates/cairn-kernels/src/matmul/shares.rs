//! How the panels of streamed products are shared out over the threads.
//!
//! Long tasks first, for the memory's streams; short ones at the end, so that threads end together: in
//! one token's run through a model there are hundreds of ends.

use std::ops::Range;

/// Weight bytes of a long task, at most.
const LONG_BYTES: usize = 128 << 10;
/// Weight bytes of a short task, at most, if that many panels are not too few.
const SHORT_BYTES: usize = 64 << 10;
/// Panels that are read together for one token.
pub(super) const GROUP_PANELS: usize = 4;

/// The tasks of some products, those of the first before those of the second.
pub(super) struct Shares<const N: usize> {
    shares: [Share; N],
}

impl<const N: usize> Shares<N> {
    /// `products` are panels, and bytes of one.
    pub(super) fn new(products: [(usize, usize); N], threads: usize) -> Self {
        let mut shares = products.map(|(panels, panel_bytes)| Share::new(panels, panel_bytes, 0));
        if let (Some(share), Some(&(panels, panel_bytes))) = (shares.last_mut(), products.last()) {
            *share = Share::new(panels, panel_bytes, threads * LONG_BYTES);
        }
        Self { shares }
    }

    /// How many tasks there are.
    pub(super) fn tasks(&self) -> usize {
        self.shares.iter().map(Share::tasks).sum()
    }

    /// The product of a task, and its panels.
    pub(super) fn of(&self, mut task: usize) -> (usize, Range<usize>) {
        for (product, share) in self.shares.iter().enumerate() {
            if task < share.tasks() {
                return (product, share.of(task));
            }
            task -= share.tasks();
        }
        (0, 0..0)
    }
}

/// The tasks of one product.
#[derive(Clone, Copy, Debug)]
struct Share {
    panels: usize,
    /// Panels of a long task.
    long: usize,
    /// Long tasks.
    num_long: usize,
    /// Panels of a short task.
    short: usize,
}

impl Share {
    /// `short_bytes` are those that short tasks get, at least.
    fn new(panels: usize, panel_bytes: usize, short_bytes: usize) -> Self {
        let of_bytes = |bytes: usize| bytes / panel_bytes.max(1);
        let groups = |panels: usize| (panels / GROUP_PANELS * GROUP_PANELS).max(GROUP_PANELS);
        let long = groups(of_bytes(LONG_BYTES));
        let num_long = panels.saturating_sub(of_bytes(short_bytes)) / long;
        let is_group_short = GROUP_PANELS * panel_bytes <= SHORT_BYTES;
        let short =
            if is_group_short { groups(of_bytes(SHORT_BYTES) / 2) } else { GROUP_PANELS / 2 };
        Self { panels, long, num_long, short }
    }

    fn tasks(&self) -> usize {
        self.num_long + (self.panels - self.num_long * self.long).div_ceil(self.short)
    }

    fn of(&self, task: usize) -> Range<usize> {
        let Self { panels, long, num_long, short } = *self;
        if task < num_long {
            return task * long..(task + 1) * long;
        }
        let first = num_long * long + (task - num_long) * short;
        first..panels.min(first + short)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_panel_is_in_one_task(
            products in prop::array::uniform3((0_usize..500, 0_usize..400_000)),
            threads in 1_usize..9,
        ) {
            let shares = Shares::new(products, threads);
            let mut next = [0; 3];
            for task in 0..shares.tasks() {
                let (product, panels) = shares.of(task);
                prop_assert_eq!(panels.start, next[product]);
                prop_assert!(!panels.is_empty());
                prop_assert!(next[product + 1..].iter().all(|&later| later == 0));
                next[product] = panels.end;
            }
            prop_assert_eq!(next, products.map(|(panels, _)| panels));
        }
    }

    #[test]
    fn the_last_tasks_are_short() {
        // The second is 3072 × 1024 in bf16z.
        let shares = Shares::new([(128, 1000), (192, 25_472)], 2);
        let lens: Vec<usize> = (0..shares.tasks()).map(|task| shares.of(task).1.len()).collect();
        assert_eq!(lens[..2], [128, 4]);
        assert_eq!(lens[lens.len() - 7..], [4, 2, 2, 2, 2, 2, 2]);
    }
}
