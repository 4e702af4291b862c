//! Random operations on pools and tables against a model in which every sequence owns its tokens.

use proptest::prelude::*;

use super::*;

/// A cache that holds one number per position, and the tables over it, beside what each sequence
/// should read.
struct Simulator {
    pool: BlockPool,
    cache: Vec<[u64; BLOCK_TOKENS]>,
    sequences: Vec<(BlockTable, Vec<u64>)>,
    next_value: u64,
}

impl Simulator {
    fn new(num_blocks: usize) -> Self {
        Self {
            pool: BlockPool::new(num_blocks),
            cache: vec![[0; BLOCK_TOKENS]; num_blocks],
            sequences: Vec::new(),
            next_value: 1,
        }
    }

    fn append(&mut self, which: usize, tokens: usize) {
        let Some(which) = which.checked_rem(self.sequences.len()) else { return };
        let (table, expected) = &mut self.sequences[which];
        let before = (table.blocks().to_vec(), self.pool.num_free());
        let Ok(copy) = table.append(&mut self.pool, tokens) else {
            assert_eq!(before, (table.blocks().to_vec(), self.pool.num_free()), "failed halfway");
            return;
        };
        if let Some(BlockCopy { from, to }) = copy {
            self.cache[to as usize] = self.cache[from as usize];
        }
        for _ in 0..tokens {
            let position = expected.len();
            let block = table.blocks()[position / BLOCK_TOKENS];
            self.cache[block as usize][position % BLOCK_TOKENS] = self.next_value;
            expected.push(self.next_value);
            self.next_value += 1;
        }
    }

    fn fork(&mut self, which: usize) {
        let Some(which) = which.checked_rem(self.sequences.len()) else { return };
        let (table, expected) = &self.sequences[which];
        let fork = (table.fork(&mut self.pool), expected.clone());
        self.sequences.push(fork);
    }

    fn release(&mut self, which: usize) {
        let Some(which) = which.checked_rem(self.sequences.len()) else { return };
        let (mut table, _) = self.sequences.swap_remove(which);
        table.release(&mut self.pool);
    }

    fn check(&self) {
        let mut owners = vec![0; self.pool.num_blocks()];
        for (table, expected) in &self.sequences {
            assert_eq!(table.num_tokens(), expected.len());
            assert_eq!(table.blocks().len(), blocks_for(expected.len()));
            for (position, value) in expected.iter().enumerate() {
                let block = table.blocks()[position / BLOCK_TOKENS] as usize;
                assert_eq!(self.cache[block][position % BLOCK_TOKENS], *value);
            }
            table.blocks().iter().for_each(|&block| owners[block as usize] += 1);
        }
        for (block, &count) in owners.iter().enumerate() {
            assert_eq!(self.pool.ref_count(u32::try_from(block).unwrap()), count, "block {block}");
        }
        assert_eq!(self.pool.num_free(), owners.iter().filter(|&&count| count == 0).count());
    }
}

proptest! {
    #[test]
    fn tables_read_what_their_sequence_wrote(
        num_blocks in 1_usize..24,
        operations in prop::collection::vec((0_u8..8, any::<usize>(), 0_usize..40), 1..80),
    ) {
        let mut simulator = Simulator::new(num_blocks);
        for (operation, which, tokens) in operations {
            match operation {
                0 => simulator.sequences.push((BlockTable::default(), Vec::new())),
                1 => simulator.fork(which),
                2 => simulator.release(which),
                _ => simulator.append(which, tokens),
            }
            simulator.check();
        }
        while !simulator.sequences.is_empty() {
            simulator.release(0);
        }
        prop_assert_eq!(simulator.pool.num_free(), num_blocks);
    }
}

#[test]
fn a_full_shared_block_is_not_copied() {
    let mut pool = BlockPool::new(4);
    let mut table = BlockTable::with_capacity(64);
    assert_eq!(table.append(&mut pool, BLOCK_TOKENS).unwrap(), None);
    let mut fork = table.fork(&mut pool);
    assert_eq!(fork.append(&mut pool, 1).unwrap(), None);
    assert_eq!(fork.blocks()[0], table.blocks()[0]);
    // The fork's second block is its own; a fork of the fork has to copy it.
    let mut second = fork.fork(&mut pool);
    let copy = second.append(&mut pool, 1).unwrap();
    assert_eq!(copy, Some(BlockCopy { from: fork.blocks()[1], to: second.blocks()[1] }));
    assert_eq!(fork.append(&mut pool, 1).unwrap(), None, "the original owns it alone again");
}
