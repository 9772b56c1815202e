//! `everstep compare`: how close the losses of runs are, as numbers and as a picture.
//!
//! Losses are smoothed by an exponential average of 0.9, as the technical report smooths them for its
//! comparison of FP8 with BF16 (appendix B), and compared over the last half of the steps.

use anyhow::{Context, Result, ensure};
use everstep_actors::{MetricsLine, RunFolder};
use plotters::prelude::*;
use std::path::{Path, PathBuf};

/// Weight of what was before in the average.
const SMOOTHING: f64 = 0.9;
const COLOURS: [RGBColor; 6] = [
    RGBColor(20, 20, 20),
    RGBColor(30, 100, 200),
    RGBColor(200, 60, 40),
    RGBColor(40, 150, 80),
    RGBColor(150, 80, 170),
    RGBColor(190, 140, 20),
];

/// A run's smoothed losses by step.
struct Curve {
    name: String,
    losses: Vec<f64>,
}

fn smoothed(losses: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut average = None;
    losses
        .map(|loss| {
            let next = average.map_or(loss, |a: f64| SMOOTHING * a + (1.0 - SMOOTHING) * loss);
            average = Some(next);
            next
        })
        .collect()
}

/// Relative differences of `a` from `b`, by step.
fn differences(a: &Curve, b: &Curve) -> Vec<f64> {
    a.losses.iter().zip(&b.losses).map(|(a, b)| (a - b).abs() / b).collect()
}

/// Mean and maximum over the last half.
fn last_half(differences: &[f64]) -> (f64, f64) {
    let half = &differences[differences.len() / 2..];
    (half.iter().sum::<f64>() / half.len() as f64, half.iter().fold(0.0, |m, x| f64::max(m, *x)))
}

/// What a pair's differences may be, in percent; no limit by default.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Bars {
    /// Fail if the mean difference of a pair is above this, in percent.
    #[arg(long, default_value_t = f64::INFINITY)]
    mean: f64,
    /// Fail if the largest difference of a pair is above this, in percent.
    #[arg(long, default_value_t = f64::INFINITY)]
    largest: f64,
}

/// Prints each pair's differences; draws the curves. Fails if a pair is further apart than it may be.
pub(crate) fn run(runs: &[PathBuf], picture: Option<&Path>, bars: Bars) -> Result<()> {
    let curve = |path: &PathBuf| -> Result<Curve> {
        let lines = MetricsLine::read_all(&RunFolder(path.clone()).metrics())?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        ensure!(!lines.is_empty(), "{} has no steps", path.display());
        Ok(Curve { name, losses: smoothed(lines.iter().map(|l| l.loss)) })
    };
    let mut curves = runs.iter().map(curve).collect::<Result<Vec<_>>>()?;
    let steps = curves.iter().map(|c| c.losses.len()).min().context("expected runs")?;
    ensure!(steps >= 2 && curves.len() >= 2, "expected two runs of two steps and more");
    curves.iter_mut().for_each(|c| c.losses.truncate(steps));
    let mut apart = Vec::new();
    for (n, a) in curves.iter().enumerate() {
        for b in &curves[..n] {
            let (mean, largest) = last_half(&differences(a, b));
            let (mean, largest) = (mean * 100.0, largest * 100.0);
            println!(
                "{} from {}: mean {mean:.4}%, largest {largest:.4}%, steps {} to {steps}",
                a.name,
                b.name,
                steps / 2
            );
            // Also where a difference is no number.
            if !(mean <= bars.mean && largest <= bars.largest) {
                apart.push(format!("{} from {}", a.name, b.name));
            }
        }
    }
    if let Some(path) = picture {
        draw(path, &curves, steps)?;
    }
    ensure!(apart.is_empty(), "further apart than {}% or {}%: {}", bars.mean, bars.largest, apart.join(", "));
    Ok(())
}

fn draw(path: &Path, curves: &[Curve], steps: usize) -> Result<()> {
    let area = SVGBackend::new(path, (900, 640)).into_drawing_area();
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(380);
    let top = curves.iter().flat_map(|c| &c.losses).fold(0.0f64, |m, x| m.max(*x)) * 1.02;
    let low = curves.iter().flat_map(|c| &c.losses).fold(f64::INFINITY, |m, x| m.min(*x)) * 0.98;
    let mut chart = ChartBuilder::on(&upper)
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..steps as f64, low..top)?;
    chart.configure_mesh().light_line_style(RGBColor(240, 240, 240)).y_desc("loss, smoothed").draw()?;
    let points = |values: &[f64]| -> Vec<(f64, f64)> {
        values.iter().enumerate().map(|(step, y)| (step as f64 + 1.0, *y)).collect()
    };
    for (n, curve) in curves.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let series = LineSeries::new(points(&curve.losses), colour.stroke_width(1));
        let label = chart.draw_series(series)?.label(&curve.name);
        label.legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    let first = &curves[0];
    let others: Vec<Vec<f64>> =
        curves[1..].iter().map(|c| differences(c, first).into_iter().map(|d| d * 100.0).collect()).collect();
    let most = others.iter().flatten().fold(0.0f64, |m, x| m.max(*x));
    let mut chart = ChartBuilder::on(&lower)
        .margin(8)
        .x_label_area_size(28)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..steps as f64, 0.0..most.max(1e-9) * 1.05)?;
    let what = format!("% from {}", first.name);
    chart.configure_mesh().light_line_style(RGBColor(240, 240, 240)).x_desc("step").y_desc(what).draw()?;
    for (n, values) in others.iter().enumerate() {
        let colour = COLOURS[(n + 1) % COLOURS.len()];
        chart.draw_series(LineSeries::new(points(values), colour.stroke_width(1)))?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_relative_and_of_the_last_half() {
        let smooth = smoothed([1.0, 1.0, 11.0].into_iter());
        assert!(smooth.iter().zip([1.0, 1.0, 2.0]).all(|(a, b): (&f64, f64)| (a - b).abs() < 1e-12));
        let curve = |losses: &[f64]| Curve { name: String::new(), losses: losses.to_vec() };
        let d = differences(&curve(&[9.0, 9.0, 2.2, 1.9]), &curve(&[1.0, 1.0, 2.0, 2.0]));
        let (mean, largest) = last_half(&d);
        assert!((mean - 0.075).abs() < 1e-12 && (largest - 0.1).abs() < 1e-12);
    }
}
