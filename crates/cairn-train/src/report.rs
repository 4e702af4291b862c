//! The report of a run: one HTML file with its curves, settings and figures.
//!
//! **Invariant:** the file stands alone. It asks for nothing from anywhere: no scripts, no fonts,
//! no images.

mod chart;

pub use chart::{Chart, Line};

use std::fmt::Write;

/// Follows the reader's preference for light or dark.
const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2024;--paper:#fff;--soft:#667;--edge:#d8dce0;--card:#f6f7f8}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--paper:#14171a;--soft:#99a;--edge:#333a40;\
--card:#1c2024}}
body{margin:2rem auto;max-width:76rem;padding:0 1rem;background:var(--paper);color:var(--ink);\
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}
figure{margin:0;padding:.5rem 1rem;border:1px solid var(--edge);border-radius:8px}
figcaption{font-weight:600}svg{width:100%;height:auto;color:var(--ink)}
table{border-collapse:collapse}td,th{text-align:left;padding:.15rem 1.5rem .15rem 0;\
border-bottom:1px solid var(--edge);vertical-align:top}th{font-weight:400;color:var(--soft)}
td{font-variant-numeric:tabular-nums}
pre{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:1rem;\
overflow-x:auto;font-size:13px}
";

/// What a report says.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// Heading: the run's name.
    pub title: &'a str,
    /// Tables in order, each with its heading and its rows of name and figure.
    pub tables: Vec<(&'a str, Vec<(String, String)>)>,
    /// Curves in order; charts without points are left out.
    pub charts: Vec<Chart>,
    /// The resolved recipe, as text.
    pub recipe: &'a str,
}

impl Report<'_> {
    /// The whole file.
    pub fn html(&self) -> String {
        let mut html = String::new();
        self.write(&mut html).expect("writing to a string cannot fail");
        html
    }

    fn write(&self, html: &mut String) -> std::fmt::Result {
        let title = escaped(self.title);
        writeln!(html, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">")?;
        writeln!(html, "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">")?;
        writeln!(html, "<title>{title}</title>\n<style>{STYLE}</style></head><body>")?;
        writeln!(html, "<h1>{title}</h1>")?;
        let mut tables = self.tables.iter();
        // The first table is the summary; the curves come right after it.
        if let Some(summary) = tables.next() {
            write_table(html, summary)?;
        }
        writeln!(html, "<h2>Curves</h2>\n<div class=\"charts\">")?;
        for (chart, svg) in self.charts.iter().filter_map(|chart| Some((chart, chart.svg()?))) {
            let caption = escaped(chart.title);
            writeln!(html, "<figure><figcaption>{caption}</figcaption>{svg}</figure>")?;
        }
        writeln!(html, "</div>")?;
        for table in tables {
            write_table(html, table)?;
        }
        writeln!(html, "<h2>Recipe</h2>\n<pre>{}</pre>\n</body></html>", escaped(self.recipe))
    }
}

fn write_table(
    html: &mut String,
    (heading, rows): &(&str, Vec<(String, String)>),
) -> std::fmt::Result {
    writeln!(html, "<h2>{}</h2>\n<table>", escaped(heading))?;
    for (name, figure) in rows {
        writeln!(html, "<tr><th>{}</th><td>{}</td></tr>", escaped(name), escaped(figure))?;
    }
    writeln!(html, "</table>")
}

/// Text as HTML.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report<'static> {
        let line = Line { name: "train", points: vec![(0.0, 3.0), (1.0, 2.0)] };
        Report {
            title: "a & b",
            tables: vec![
                ("Summary", vec![("steps".to_owned(), "2".to_owned())]),
                ("Data", vec![("file".to_owned(), "<script>alert(1)</script>".to_owned())]),
            ],
            charts: vec![Chart { title: "Loss", lines: vec![line] }],
            recipe: "schema = \"train/1\"",
        }
    }

    #[test]
    fn it_holds_everything_and_asks_for_nothing() {
        let html = report().html();
        assert!(html.contains("<title>a &amp; b</title>") && html.contains("&lt;script&gt;"));
        assert!(html.contains("<figcaption>Loss</figcaption><svg") && html.contains("train/1"));
        for request in ["<script", "<link", "<img", "src=", "@import", "url("] {
            assert!(!html.contains(request), "{request}");
        }
        // The name of the SVG namespace is the only address in it.
        let addresses = html.matches("http").count();
        assert_eq!(addresses, html.matches("xmlns=\"http://www.w3.org/2000/svg\"").count());
    }
}
