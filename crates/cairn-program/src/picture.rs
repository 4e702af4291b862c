//! A program as a picture: an SVG of its forward pass, drawn from the instructions alone.
//!
//! Data flows downwards; instructions that do not wait for each other stand side by side. Blocks that
//! repeat are drawn once with the number of times, also where they repeat in turns (one windowed,
//! one global). Weights are named in the boxes that read them. The file carries its own style, for
//! light and dark, and needs nothing else.

mod fold;
mod layout;

use std::fmt::Write as _;

use crate::op::Op;
use crate::program::{Instr, Program};
use crate::value::{Class, ValueId};
use fold::{Section, sections};
use layout::{BOX_HEIGHT, BOX_WIDTH, Layout, MARGIN, Point};

/// Height of a section's title.
const TITLE_HEIGHT: f64 = 34.0;
/// Between two sections.
const SECTION_GAP: f64 = 30.0;
/// Characters that fit in a box.
const BOX_CHARACTERS: usize = 29;

const STYLE: &str = "\
svg{font:12px system-ui,sans-serif;background:#fff;color:#1d2129}\
.box rect{fill:#f4f5f7;stroke:#c9ced6}.box.product rect{fill:#e3edfb;stroke:#6c9be0}\
.box.attention rect{fill:#fdeede;stroke:#e0994c}.box.lookup rect{fill:#e8f5e6;stroke:#7dbb74}\
.section{fill:none;stroke:#c9ced6;stroke-dasharray:4 4}\
text{fill:currentColor;text-anchor:middle}.op{font-weight:600}.small{font-size:10px;opacity:.75}\
.title{text-anchor:start;font-weight:600;font-size:13px}\
.edge{fill:none;stroke:#7b8494;stroke-width:1.4}\
@media (prefers-color-scheme:dark){svg{background:#16181d;color:#e6e8ec}\
.box rect{fill:#23262d;stroke:#444a55}.box.product rect{fill:#1d2c44;stroke:#4f7fc6}\
.box.attention rect{fill:#3d2b18;stroke:#c07f35}.box.lookup rect{fill:#1e3320;stroke:#5d9b55}\
.section{stroke:#444a55}}";

impl Program {
    /// The forward pass as an SVG document.
    pub fn picture(&self) -> String {
        let sections = sections(self);
        let layouts: Vec<Layout> =
            sections.iter().map(|section| Layout::new(self, &section.instrs)).collect();
        let width = layouts.iter().map(|layout| layout.width).fold(0.0, f64::max) + 2.0 * MARGIN;
        let mut body = String::new();
        let mut top = MARGIN;
        for (index, (section, layout)) in sections.iter().zip(&layouts).enumerate() {
            if index > 0 {
                let (from, to) = (top - SECTION_GAP, top);
                edge(
                    &mut body,
                    &[Point { x: width / 2.0, y: from }, Point { x: width / 2.0, y: to }],
                );
            }
            top = self.draw_section(&mut body, (section, layout), (width, top)) + SECTION_GAP;
        }
        let height = top - SECTION_GAP + MARGIN;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\">\n\
             <title>Forward pass of a program, vis/{}</title>\n<style>{STYLE}</style>\n\
             <defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"6\" \
             markerHeight=\"6\" orient=\"auto\"><path d=\"M0 0 8 4 0 8z\" fill=\"#7b8494\"/></marker>\
             </defs>\n{body}</svg>\n",
            self.version
        )
    }

    /// Draws one section from `top` down and returns where it ends.
    fn draw_section(
        &self,
        body: &mut String,
        (section, layout): (&Section, &Layout),
        (width, top): (f64, f64),
    ) -> f64 {
        let height = layout.height + TITLE_HEIGHT;
        let _ = writeln!(
            body,
            "<rect class=\"section\" x=\"{:.0}\" y=\"{top:.0}\" width=\"{:.0}\" height=\"{height:.0}\" \
             rx=\"10\"/>\n<text class=\"title\" x=\"{:.0}\" y=\"{:.0}\">{}</text>",
            MARGIN / 2.0,
            width - MARGIN,
            MARGIN,
            top + 21.0,
            escaped(&section.title)
        );
        let shift = Point { x: width / 2.0, y: top + TITLE_HEIGHT };
        for path in &layout.edges {
            let moved: Vec<Point> = path.iter().map(|point| point.plus(shift)).collect();
            edge(body, &moved);
        }
        for (&index, place) in section.instrs.iter().zip(&layout.boxes) {
            self.draw_box(body, &self.instrs[index], place.plus(shift));
        }
        top + height
    }

    /// One instruction, its center at `place`.
    fn draw_box(&self, body: &mut String, instr: &Instr, place: Point) {
        let class = match instr.op {
            Op::Matmul | Op::HeadMatmul => "box product",
            Op::Attention(_) | Op::KvWrite { .. } => "box attention",
            Op::Embed | Op::PositionEmbed | Op::GatherRows => "box lookup",
            _ => "box",
        };
        let result = instr.writes().next().map(|id| self.value(id));
        let mut text = String::new();
        if let Some(result) = result {
            text = format!("{}{}", result.value_type, result.shape);
        }
        let weights: Vec<&str> =
            self.weights_of(instr).map(|id| short(&self.value(id).name)).collect();
        let Point { x, y } = place;
        let _ = writeln!(
            body,
            "<g class=\"{class}\"><title>{}</title>\
             <rect x=\"{:.1}\" y=\"{:.1}\" width=\"{BOX_WIDTH}\" height=\"{BOX_HEIGHT}\" rx=\"7\"/>\
             <text class=\"op\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>\
             <text class=\"small\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>\
             <text class=\"small\" x=\"{x:.1}\" y=\"{:.1}\">{}</text></g>",
            escaped(&self.tooltip(instr)),
            x - BOX_WIDTH / 2.0,
            y - BOX_HEIGHT / 2.0,
            y - 9.0,
            escaped(&cut(&heading(&instr.op))),
            y + 4.0,
            escaped(&cut(&weights.join(", "))),
            y + 17.0,
            escaped(&cut(&text)),
        );
    }

    fn weights_of<'a>(&'a self, instr: &'a Instr) -> impl Iterator<Item = ValueId> + 'a {
        instr.reads().filter(|&id| self.value(id).class == Class::Weight)
    }

    /// Everything there is to say about an instruction.
    fn tooltip(&self, instr: &Instr) -> String {
        let names = |ids: &mut dyn Iterator<Item = ValueId>| -> Vec<String> {
            ids.map(|id| {
                let value = self.value(id);
                format!("{} : {}{}", value.name, value.value_type, value.shape)
            })
            .collect()
        };
        let (reads, writes) = (names(&mut instr.reads()), names(&mut instr.writes()));
        format!("{}\nreads {}\nwrites {}", instr.op, reads.join(", "), writes.join(", "))
    }
}

/// What stands first in a box: the operation with the attributes that tell layers apart.
fn heading(op: &Op) -> String {
    match op {
        Op::Attention(attrs) => match attrs.mask.window {
            Some(window) => format!("attention, window {window}"),
            None if attrs.mask.causal => "attention, causal".to_owned(),
            None => "attention, both ways".to_owned(),
        },
        Op::Glu(act) => format!("glu {act:?}"),
        Op::Activation(act) => format!("{act:?}"),
        Op::KvWrite { .. } => "kv_write".to_owned(),
        _ => op.name().to_owned(),
    }
}

/// A weight's name within its block: `self_attn.q_proj`.
fn short(name: &str) -> &str {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let Some(inside) = name.strip_prefix("model.layers.") else {
        return name;
    };
    inside.split_once('.').map_or(name, |(_, rest)| rest)
}

fn cut(text: &str) -> String {
    if text.chars().count() <= BOX_CHARACTERS {
        return text.to_owned();
    }
    text.chars().take(BOX_CHARACTERS - 1).chain(['…']).collect()
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() && c != '\n' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A line through points, bent softly, with a tip.
fn edge(body: &mut String, points: &[Point]) {
    let [first, rest @ ..] = points else { return };
    let mut path = format!("M{:.1} {:.1}", first.x, first.y);
    let mut from = *first;
    for to in rest {
        if (to.x - from.x).abs() < 0.5 {
            let _ = write!(path, "V{:.1}", to.y);
        } else {
            let middle = f64::midpoint(from.y, to.y);
            let _ = write!(
                path,
                "C{:.1} {middle:.1} {:.1} {middle:.1} {:.1} {:.1}",
                from.x, to.x, to.x, to.y
            );
        }
        from = *to;
    }
    let _ = writeln!(body, "<path class=\"edge\" d=\"{path}\" marker-end=\"url(#tip)\"/>");
}

#[cfg(test)]
mod tests;
