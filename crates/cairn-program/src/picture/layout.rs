//! Where the boxes of a section stand and how the lines between them run.
//!
//! An instruction stands one row below the lowest it reads from. A line that passes rows on its way
//! takes a place in each; a line that passes three or more (a residual) runs along the left side.

use std::collections::HashMap;
use std::ops::Range;

use crate::program::Program;
use crate::value::{Class, ValueId};

/// Width of a box.
pub(super) const BOX_WIDTH: f64 = 172.0;
/// Height of a box.
pub(super) const BOX_HEIGHT: f64 = 52.0;
/// Around the drawing.
pub(super) const MARGIN: f64 = 24.0;
const GAP: f64 = 22.0;
const ROW: f64 = BOX_HEIGHT + 34.0;
/// Width that a passing line takes in a row.
const LINE_WIDTH: f64 = 14.0;
const LANE: f64 = 20.0;
/// Rows a line passes before it runs along the side.
const LONG: usize = 3;

/// A point, in pixels; a section's own points count from its top center.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
}

impl Point {
    pub(super) fn plus(self, other: Self) -> Self {
        Self { x: self.x + other.x, y: self.y + other.y }
    }
}

/// A section, laid out.
pub(super) struct Layout {
    /// Centers of the boxes, in the order of the instructions.
    pub(super) boxes: Vec<Point>,
    /// Lines between them.
    pub(super) edges: Vec<Vec<Point>>,
    pub(super) width: f64,
    pub(super) height: f64,
}

/// What takes a place in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Item {
    Box(usize),
    /// The passing line of an edge.
    Line(usize),
}

/// A line from a box, or from what came before the section, to a box.
#[derive(Clone, Copy, Debug)]
struct Edge {
    from: Option<usize>,
    to: usize,
}

impl Layout {
    /// Lays out instructions of a program.
    pub(super) fn new(program: &Program, instrs: &[usize]) -> Self {
        let edges = edges(program, instrs);
        let mut rows = vec![0_usize; instrs.len()];
        for edge in &edges {
            // Edges are sorted by their ends, so a box's row is final before it is read from.
            let after = edge.from.map_or(0, |from| rows[from] + 1);
            rows[edge.to] = rows[edge.to].max(after);
        }
        let first_row = |edge: &Edge| edge.from.map_or(0, |from| rows[from] + 1);
        let is_long = |edge: &Edge| rows[edge.to] - first_row(edge) >= LONG;
        let row_count = rows.iter().max().map_or(0, |last| last + 1);
        let mut items: Vec<Vec<Item>> = vec![Vec::new(); row_count];
        for (index, &row) in rows.iter().enumerate() {
            items[row].push(Item::Box(index));
        }
        for (index, edge) in edges.iter().enumerate().filter(|(_, edge)| !is_long(edge)) {
            for row in &mut items[first_row(edge)..rows[edge.to]] {
                row.push(Item::Line(index));
            }
        }
        let places = place(&mut items, &edges);
        let long = (0..edges.len()).filter(|&index| is_long(&edges[index]));
        let lanes =
            lanes(long.map(|index| (index, first_row(&edges[index])..rows[edges[index].to])));
        let half = places.values().map(|place| place.x.abs()).fold(0.0, f64::max) + BOX_WIDTH / 2.0;
        let lane_count = lanes.values().max().map_or(0, |last| last + 1);
        let paths = edges
            .iter()
            .enumerate()
            .map(|(index, edge)| {
                let lane = lanes.get(&index).map(|lane| -half - LANE * (lane + 1) as f64);
                path(edge, (index, &rows), &places, lane)
            })
            .collect();
        Self {
            boxes: (0..instrs.len()).map(|index| places[&Item::Box(index)]).collect(),
            edges: paths,
            width: 2.0 * (half + lane_count as f64 * LANE + GAP),
            height: row_count as f64 * ROW,
        }
    }
}

/// Gives lines that pass common rows different lanes.
fn lanes(long: impl Iterator<Item = (usize, Range<usize>)>) -> HashMap<usize, usize> {
    let mut taken: Vec<Vec<Range<usize>>> = Vec::new();
    let mut lanes = HashMap::new();
    for (edge, rows) in long {
        let overlaps = |other: &Range<usize>| other.start < rows.end && rows.start < other.end;
        let free = taken.iter().position(|lane| !lane.iter().any(overlaps));
        let lane = free.unwrap_or(taken.len());
        taken.resize(taken.len().max(lane + 1), Vec::new());
        taken[lane].push(rows);
        lanes.insert(edge, lane);
    }
    lanes
}

/// The lines of a section, sorted by where they end. What another section makes comes from above;
/// inputs of the run and weights have no line.
fn edges(program: &Program, instrs: &[usize]) -> Vec<Edge> {
    let mut maker: HashMap<ValueId, usize> = HashMap::new();
    let mut edges: Vec<Edge> = Vec::new();
    for (to, &index) in instrs.iter().enumerate() {
        let instr = &program.instrs[index];
        let mut sources: Vec<Option<usize>> = instr
            .reads()
            .filter(|&id| program.value(id).class == Class::Temp)
            .map(|id| maker.get(&id).copied())
            .collect();
        sources.sort_unstable();
        sources.dedup();
        edges.extend(sources.into_iter().map(|from| Edge { from, to }));
        maker.extend(instr.writes().map(|id| (id, to)));
    }
    edges
}

/// Gives every item its place: each row centered, ordered by where its items come from.
fn place(items: &mut [Vec<Item>], edges: &[Edge]) -> HashMap<Item, Point> {
    let mut places: HashMap<Item, Point> = HashMap::new();
    for (row, items) in items.iter_mut().enumerate() {
        let wish = |item: &Item| -> f64 {
            let came: Vec<f64> = match *item {
                Item::Line(index) => {
                    let above = places.get(item).map(|place| place.x);
                    let from = edges[index].from.map(Item::Box);
                    above.or_else(|| from.map(|from| places[&from].x)).into_iter().collect()
                }
                Item::Box(index) => {
                    let into = edges.iter().enumerate().filter(|(_, edge)| edge.to == index);
                    into.filter_map(|(number, edge)| {
                        let line = places.get(&Item::Line(number));
                        line.or_else(|| places.get(&Item::Box(edge.from?))).map(|place| place.x)
                    })
                    .collect()
                }
            };
            came.iter().sum::<f64>() / came.len().max(1) as f64
        };
        let mut wished: Vec<(f64, Item)> = items.iter().map(|item| (wish(item), *item)).collect();
        wished.sort_by(|a, b| a.0.total_cmp(&b.0));
        let width = |item: &Item| match item {
            Item::Box(_) => BOX_WIDTH,
            Item::Line(_) => LINE_WIDTH,
        };
        let total: f64 = wished.iter().map(|(_, item)| width(item) + GAP).sum::<f64>() - GAP;
        let mut left = -total / 2.0;
        for (_, item) in wished {
            let x = left + width(&item) / 2.0;
            places.insert(item, Point { x, y: ROW * (row as f64 + 0.5) });
            left += width(&item) + GAP;
        }
    }
    places
}

/// The points a line goes through.
fn path(
    edge: &Edge,
    (index, rows): (usize, &[usize]),
    places: &HashMap<Item, Point>,
    lane: Option<f64>,
) -> Vec<Point> {
    let half = BOX_HEIGHT / 2.0;
    let start = match edge.from {
        Some(from) => places[&Item::Box(from)].plus(Point { x: 0.0, y: half }),
        None => Point { x: 0.0, y: 0.0 },
    };
    let end = places[&Item::Box(edge.to)].plus(Point { x: 0.0, y: -half });
    let mut points = vec![start];
    if let Some(x) = lane {
        let first = edge.from.map_or(0, |from| rows[from] + 1);
        points.push(Point { x, y: ROW * (first as f64 + 0.5) - half });
        points.push(Point { x, y: end.y - (ROW - BOX_HEIGHT) });
    } else if let Some(passing) = places.get(&Item::Line(index)) {
        // Its places in the rows share one x: the last row's.
        let first = edge.from.map_or(0, |from| rows[from] + 1);
        let top = ROW * (first as f64 + 0.5) - half;
        points.push(Point { x: passing.x, y: top });
        points.push(Point { x: passing.x, y: passing.y + half });
    }
    points.push(end);
    points
}
