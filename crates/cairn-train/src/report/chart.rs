//! One line chart as inline SVG that takes its ink from the page, so that it reads on light and
//! dark.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// Width and height in the units of the drawing; the page scales it.
const SIZE: (u32, u32) = (640, 280);
/// Points drawn per line at most; longer lines are averaged over equal runs of points.
const POINTS_MAX: usize = 800;
/// Stands for the text color of the page in what plotters writes.
const INK: RGBColor = RGBColor(1, 2, 3);
/// How plotters writes [`INK`].
const INK_WRITTEN: &str = "#010203";
/// Lines of the chart; middle tones, legible on white and on near-black.
const PALETTE: [RGBColor; 3] =
    [RGBColor(0x2f, 0x81, 0xd6), RGBColor(0xd9, 0x6b, 0x1f), RGBColor(0x2a, 0x9d, 0x6a)];

/// One named line.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// In the legend.
    pub name: &'static str,
    /// `(x, y)` with x ascending. Values that are not numbers are left out.
    pub points: Vec<(f64, f64)>,
}

/// A titled chart of one or more lines over the steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// Heading.
    pub title: &'static str,
    /// Its lines; those without points are left out.
    pub lines: Vec<Line>,
}

impl Chart {
    /// The drawing as an `<svg>` element; `None` if no line has a point.
    pub fn svg(&self) -> Option<String> {
        let lines: Vec<Line> = self.lines.iter().filter_map(thinned).collect();
        let (x_range, y_range) = ranges(&lines)?;
        let mut svg = String::new();
        self.draw(&mut svg, &lines, x_range, y_range).expect("writing to a string cannot fail");
        let svg = svg.replace(INK_WRITTEN, "currentColor");
        // The first tag fixes a size in pixels; the page decides the width instead.
        let fixed = format!(r#"<svg width="{}" height="{}" "#, SIZE.0, SIZE.1);
        let label = format!(r#"<svg role="img" aria-label="{}" "#, self.title);
        Some(svg.replacen(&fixed, &label, 1))
    }

    fn draw(
        &self,
        svg: &mut String,
        lines: &[Line],
        x_range: std::ops::Range<f64>,
        y_range: std::ops::Range<f64>,
    ) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let digits = digits(&y_range);
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(64)
            .build_cartesian_2d(Steps(x_range), y_range)?;
        chart
            .configure_mesh()
            .axis_style(INK.mix(0.5))
            .bold_line_style(INK.mix(0.15))
            .light_line_style(INK.mix(0.0))
            .label_style(("sans-serif", 13).into_font().color(&INK))
            .x_labels(8)
            .y_labels(6)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.digits$}"))
            .draw()?;
        for (line, color) in lines.iter().zip(PALETTE) {
            let style = color.stroke_width(2);
            let drawn = chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
            drawn.label(line.name).legend(move |(x, y)| {
                PathElement::new(vec![(x, y), (x + 16, y)], color.stroke_width(2))
            });
        }
        if lines.len() > 1 {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .label_font(("sans-serif", 13).into_font().color(&INK))
                .draw()?;
        }
        root.present()
    }
}

/// Steps as f64 with marks at whole steps only.
struct Steps(std::ops::Range<f64>);

impl Ranged for Steps {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.0.clone()).map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let mut points = RangedCoordf64::from(self.0.clone()).key_points(hint);
        points.retain(|point| point.fract() == 0.0);
        points
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.0.clone()
    }
}

impl ValueFormatter<f64> for Steps {
    fn format_ext(&self, value: &f64) -> String {
        format!("{value:.0}")
    }
}

/// The line with at most [`POINTS_MAX`] points, each the mean of a run; `None` without any.
fn thinned(line: &Line) -> Option<Line> {
    let numbers: Vec<(f64, f64)> =
        line.points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let run = numbers.len().div_ceil(POINTS_MAX).max(1);
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        let sum = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    let points: Vec<_> = numbers.chunks(run).map(mean).collect();
    (!points.is_empty()).then_some(Line { name: line.name, points })
}

/// What both axes span, with a little air above and below.
fn ranges(lines: &[Line]) -> Option<(std::ops::Range<f64>, std::ops::Range<f64>)> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let span = |axis: fn(&(f64, f64)) -> f64| {
        points().map(axis).fold(None, |span: Option<(f64, f64)>, value| {
            Some(span.map_or((value, value), |(low, high)| (low.min(value), high.max(value))))
        })
    };
    let (x_low, x_high) = span(|point| point.0)?;
    let (y_low, y_high) = span(|point| point.1)?;
    let air = if y_high > y_low { 0.05 * (y_high - y_low) } else { y_high.abs().max(1e-6) * 0.05 };
    Some((x_low..x_high.max(x_low + 1.0), y_low - air..y_high + air))
}

/// Digits after the point that tell neighboring marks apart.
fn digits(range: &std::ops::Range<f64>) -> usize {
    let step = (range.end - range.start) / 6.0;
    (0..9_u16).find(|&digits| step >= 10_f64.powi(-i32::from(digits))).map_or(9, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        Chart { title: "loss", lines: vec![Line { name: "train", points }] }
    }

    #[test]
    fn a_chart_is_one_svg_that_inherits_its_ink_and_scales() {
        let svg = chart((0..5000).map(|x| (f64::from(x), f64::from(x).sqrt())).collect()).svg();
        let svg = svg.unwrap();
        assert!(svg.starts_with(r#"<svg role="img" aria-label="loss" viewBox="#), "{}", &svg[..90]);
        assert_eq!(svg.matches("<svg").count(), 1);
        assert!(svg.contains("currentColor") && !svg.contains(INK_WRITTEN));
        assert!(svg.len() < 40_000, "long lines are thinned: {} bytes", svg.len());
    }

    #[test]
    fn one_point_draws_and_none_or_only_nan_does_not() {
        assert!(chart(vec![(3.0, 1.0)]).svg().is_some());
        assert!(chart(vec![(3.0, f64::NAN)]).svg().is_none());
        assert!(chart(Vec::new()).svg().is_none());
    }

    #[test]
    fn marks_have_as_many_digits_as_they_need() {
        assert_eq!(digits(&(0.0..60.0)), 0);
        assert_eq!(digits(&(2.0..3.0)), 1);
        assert_eq!(digits(&(0.0..1e-3)), 4);
    }
}
