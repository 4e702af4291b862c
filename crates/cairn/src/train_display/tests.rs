//! What the progress line shows, at several widths of a terminal.

use std::io;
use std::sync::{Arc, Mutex};

use cairn_train::{Event, Observer, StepMetrics};
use indicatif::TermLike;

use super::{TrainDisplay, line};
use crate::progress_line::ProgressLine;
use crate::terminal::Terminal;

fn metrics() -> StepMetrics {
    StepMetrics {
        step: 1234,
        tokens: 5_000_000,
        loss: 3.123_45,
        lr: 1e-3,
        grad_norm: 0.5,
        tokens_per_s: 2612.3,
        peak_fraction: Some(0.447),
        anonymous_bytes: Some(818 << 20),
        elapsed_s: 60.0,
        remaining_s: 200.4,
    }
}

#[test]
fn the_line_has_loss_speed_share_memory_and_time() {
    let line = |columns| line(&metrics(), 5000, columns);
    let whole = "1234/5000  loss 3.123  2612 tokens/s  45 % of peak  818 MiB  3 m 20 s left";
    assert_eq!(line(usize::MAX), whole);
    assert_eq!(line(74), whole);
    assert_eq!(line(73), "1234/5000  loss 3.123  2612 tokens/s  45 %  818 MiB  3 m 20 s");
    assert_eq!(line(60), "1234/5000  loss 3.123  2612 tokens/s  45 %  3 m 20 s");
    assert_eq!(line(46), "1234/5000  loss 3.123  2612 tokens/s  3 m 20 s");
    assert_eq!(line(30), "1234/5000  loss 3.123");
    assert_eq!(line(0), "1234/5000  loss 3.123");
}

#[test]
fn what_was_not_measured_is_left_out() {
    let metrics = StepMetrics {
        peak_fraction: None,
        anonymous_bytes: None,
        remaining_s: f64::INFINITY,
        ..metrics()
    };
    assert_eq!(line(&metrics, 5000, 80), "1234/5000  loss 3.123  2612 tokens/s  ? left");
}

/// A terminal that remembers what was written on it, line by line.
#[derive(Clone, Debug)]
struct Screen {
    width: u16,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Screen {
    fn write(&self, text: &str) -> io::Result<()> {
        self.lines.lock().unwrap().push(text.to_owned());
        Ok(())
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        self.width
    }
    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write(text)
    }
    fn write_str(&self, text: &str) -> io::Result<()> {
        self.write(text)
    }
    fn clear_line(&self) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What one step leaves on a terminal of a width.
fn drawn(width: u16) -> Vec<String> {
    let screen = Screen { width, lines: Arc::default() };
    let terminal = Terminal::new(true, false);
    let screens: [Box<dyn TermLike>; 2] = [Box::new(screen.clone()), Box::new(screen.clone())];
    let line = ProgressLine::on_screen(terminal, "Training", screens);
    let mut display = TrainDisplay { terminal, line, total_steps: 5000 };
    display.observe(&Event::Step(&metrics()));
    display.finish();
    std::mem::take(&mut *screen.lines.lock().unwrap())
}

#[test]
fn the_line_fits_terminals_of_every_width() {
    for width in [14, 20, 40, 60, 80, 100, 120, 200] {
        let lines = drawn(width);
        let longest = lines.iter().map(|line| line.chars().count()).max().unwrap();
        assert!(longest <= usize::from(width), "{width}: {lines:?}");
        let all = lines.concat();
        assert!(all.contains("Training ") || width < 22, "{width}: {lines:?}");
        assert!(all.contains("1234/5000") || width < 22, "{width}: {lines:?}");
        assert!(!all.contains('░'), "the bar of somebody else: {lines:?}");
        for part in ["loss 3.123", "2612 tokens/s", "45 %", "818 MiB", "3 m 20 s"] {
            assert!(width < 80 || all.contains(part), "{part} at {width}: {lines:?}");
        }
        assert_eq!(all.contains("[====>  "), 120 <= width, "{width}: {lines:?}");
    }
}
