//! The tree against a list of paths.

use super::*;

fn block_of(tokens: std::ops::Range<u32>) -> Vec<u32> {
    tokens.collect()
}

fn grown(tree: &mut PrefixTree, end: PathEnd, tokens: &[u32], block: u32) -> PathEnd {
    match tree.grow(end, tokens, block) {
        Grown::New(end) => end,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_path_is_found_block_by_block() {
    let mut tree = PrefixTree::new(8);
    let root = PathEnd::root(0);
    let (a, b, c) = (block_of(0..16), block_of(16..32), block_of(32..48));
    let first = grown(&mut tree, root, &a, 3);
    let second = grown(&mut tree, first, &b, 5);
    grown(&mut tree, first, &c, 6);
    assert_eq!(tree.child(root, &a), Some((3, first)));
    assert_eq!(tree.child(first, &b), Some((5, second)));
    assert_eq!(tree.child(root, &b), None, "the same tokens elsewhere");
    assert_eq!(tree.grow(first, &b, 7), Grown::Known(5, second));
    assert!(!tree.holds(7));
}

#[test]
fn salts_keep_paths_apart() {
    let mut tree = PrefixTree::new(8);
    let tokens = block_of(0..16);
    let end = grown(&mut tree, PathEnd::root(1), &tokens, 0);
    grown(&mut tree, end, &tokens, 1);
    assert_eq!(tree.child(PathEnd::root(2), &tokens), None);
    assert_eq!(tree.closest(PathEnd::root(2), &tokens[..9]), None, "nor is a part of it found");
    assert_eq!(tree.closest(PathEnd::root(1), &tokens[..9]), Some((0, 9)));
    let other = grown(&mut tree, PathEnd::root(2), &tokens, 2);
    assert_ne!(other, end);
}

#[test]
fn others_salts_hide_nothing_that_is_near() {
    let mut tree = PrefixTree::new(400);
    let mine = PathEnd::root(1);
    tree.grow_tail(mine, &[1, 2, 3], 0);
    (1..=255).for_each(|block| tree.grow_tail(PathEnd::root(2), &[block], block));
    assert_eq!(tree.closest(mine, &[1, 2]), Some((0, 2)));
    // There is an end to looking.
    tree.grow_tail(PathEnd::root(2), &[256], 256);
    assert_eq!(tree.closest(mine, &[1, 2]), None);
}

#[test]
fn the_child_that_begins_most_alike_is_found() {
    let mut tree = PrefixTree::new(80);
    let root = PathEnd::root(0);
    tree.grow_tail(root, &[1, 2, 3], 0);
    tree.grow_tail(root, &[1, 2, 4, 5], 1);
    tree.grow_tail(root, &[1, 2, 4], 2);
    assert!(!tree.holds(2), "block 1 holds it");
    assert_eq!(tree.closest(root, &[1, 2, 4, 6, 7]), Some((1, 3)));
    assert_eq!(tree.closest(root, &[1, 2, 3, 6]), Some((0, 3)));
    assert_eq!(tree.closest(root, &[2]), None);
    // So many are compared, and no more: the first two are forgotten behind others.
    (0..40).for_each(|token| tree.grow_tail(root, &[100 + token], 10 + token));
    assert_eq!(tree.closest(root, &[1, 2, 3]), None);
}

#[test]
fn what_leaves_is_gone_and_known_to_have_been_there() {
    let mut tree = PrefixTree::new(8);
    let root = PathEnd::root(0);
    let blocks: Vec<Vec<u32>> = (0..5).map(|i| block_of(16 * i..16 * i + 16)).collect();
    // In the middle of the children, first and last.
    for order in [[2, 0, 4, 1, 3], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]] {
        for (block, tokens) in (0..).zip(&blocks) {
            grown(&mut tree, root, tokens, block);
        }
        for (gone, block) in order.into_iter().enumerate() {
            tree.remove(block, true);
            assert!(tree.was_evicted(root, &blocks[block as usize]));
            for &left in &order[gone + 1..] {
                assert!(tree.child(root, &blocks[left as usize]).is_some());
                assert!(tree.closest(root, &blocks[left as usize][..4]).is_some());
            }
            assert!(tree.child(root, &blocks[block as usize]).is_none());
        }
    }
    assert!(!tree.was_evicted(root, &block_of(200..216)));
    assert_eq!(tree.first, NONE);
}
