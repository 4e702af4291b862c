//! A queue of blocks in which any of them can be reached: first in, first out, or out of the middle.
//!
//! **Invariant:** a block stands in the queue at most once; the links of the others mean nothing.

/// No block.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

/// Blocks in order, each linked to its neighbors.
#[derive(Debug)]
pub(crate) struct BlockQueue {
    /// By block.
    links: Vec<Link>,
    first: u32,
    last: u32,
    len: usize,
}

impl BlockQueue {
    /// An empty queue for ids below `num_blocks`.
    pub(crate) fn new(num_blocks: usize) -> Self {
        let links = vec![Link { before: NONE, after: NONE }; num_blocks];
        Self { links, first: NONE, last: NONE, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Appends a block that is not in the queue.
    pub(crate) fn push_back(&mut self, block: u32) {
        self.links[block as usize] = Link { before: self.last, after: NONE };
        match self.last {
            NONE => self.first = block,
            last => self.links[last as usize].after = block,
        }
        self.last = block;
        self.len += 1;
    }

    /// Takes a block out that is in the queue.
    pub(crate) fn remove(&mut self, block: u32) {
        let Link { before, after } = self.links[block as usize];
        match before {
            NONE => self.first = after,
            before => self.links[before as usize].after = after,
        }
        match after {
            NONE => self.last = before,
            after => self.links[after as usize].before = before,
        }
        self.len -= 1;
    }

    /// Takes the block that came first.
    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let first = self.first;
        (first != NONE).then(|| {
            self.remove(first);
            first
        })
    }

    /// The blocks, first to last.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        let found = |block: u32| (block != NONE).then_some(block);
        std::iter::successors(found(self.first), move |&block| {
            found(self.links[block as usize].after)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_leave_in_order_or_out_of_the_middle() {
        let mut queue = BlockQueue::new(6);
        (0..6).for_each(|block| queue.push_back(block));
        [2, 0, 5].into_iter().for_each(|block| queue.remove(block));
        queue.push_back(2);
        assert_eq!(queue.iter().collect::<Vec<_>>(), [1, 3, 4, 2]);
        assert_eq!((queue.len(), queue.pop_front()), (4, Some(1)));
        [3, 4, 2].iter().for_each(|&block| assert_eq!(queue.pop_front(), Some(block)));
        assert_eq!((queue.len(), queue.pop_front()), (0, None));
    }
}
