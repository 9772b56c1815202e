//! report.html: how a run went, as pictures and a table. One file, nothing from outside.

use crate::chaos::{Kill, counted};
use crate::recoveries::{self, Recovery};
use anyhow::Result;
use everstep_actors::{MetricsLine, RunFolder};
use plotters::prelude::*;
use std::fmt::Write;

/// Writes a run's report.
pub(crate) fn write(run: &RunFolder) -> Result<()> {
    let lines = MetricsLine::read_all(&run.metrics())?;
    let loss: Vec<(f64, f64)> = lines.iter().map(|l| (l.step as f64, l.loss)).collect();
    let rate: Vec<(f64, f64)> =
        lines.iter().filter(|l| l.tokens_per_s > 0.0).map(|l| (l.step as f64, l.tokens_per_s)).collect();
    let mut html = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Everstep run</title>\
         <style>body{font:15px system-ui;max-width:60rem;margin:2rem auto;color:#222}\
         table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}\
         code{font-size:13px}</style>",
    );
    write!(html, "<h1>{}</h1>", escape(&run.0.display().to_string()))?;
    if let Some(last) = lines.last() {
        write!(
            html,
            "<p>{} steps, last loss {:.4} nats, fingerprint <code>{}</code></p>",
            last.step, last.loss, last.fingerprint
        )?;
    }
    let faults = Kill::read_all(run);
    write!(html, "<h2>Loss (nats per byte)</h2>{}", curve(&loss, &faults)?)?;
    if !faults.is_empty() {
        let (n, colour, kinds) = (faults.len(), "#c33", counted(&faults));
        write!(html, "<p><span style=\"color:{colour}\">|</span> one of {n} faults that chaos made: {kinds}</p>")?;
    }
    write!(html, "<h2>Tokens per second</h2>{}", curve(&rate, &faults)?)?;
    let events = recoveries::events(run).unwrap_or_default();
    write!(html, "<h2>Recoveries</h2>{}", bars(&recoveries::among(&events)?)?)?;
    html.push_str("<h2>What happened</h2><table><tr><th>event</th><th>details</th></tr>");
    for event in events {
        let serde_json::Value::Object(mut object) = event else { continue };
        object.remove("time");
        let name = object.remove("event").unwrap_or_default();
        let details: Vec<String> = object.iter().map(|(k, v)| format!("{k} {v}")).collect();
        write!(
            html,
            "<tr><td>{}</td><td>{}</td></tr>",
            escape(name.as_str().unwrap_or_default()),
            escape(&details.join(", "))
        )?;
    }
    html.push_str("</table></html>\n");
    std::fs::write(run.report(), html)?;
    Ok(())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A bar for each recovery, in the colours of its phases.
fn bars(all: &[Recovery]) -> Result<String> {
    const COLOURS: [&str; 6] = ["#c33", "#e90", "#fc3", "#39c", "#396", "#999"];
    let Some(longest) = all.iter().map(Recovery::whole).max_by(f64::total_cmp) else {
        return Ok("<p>none</p>".to_owned());
    };
    let mut html = String::from("<p>");
    for ((name, _), colour) in all[0].phases().iter().zip(COLOURS) {
        write!(html, "<span style=\"color:{colour}\">&#9632;</span> {name} ")?;
    }
    html.push_str("</p><table><tr><th>step</th><th>ms</th><th>actors</th><th></th><th>why</th></tr>");
    for recovery in all {
        write!(html, "<tr><td>{}</td><td>{:.0}</td><td>{}</td><td>", recovery.step, recovery.whole(), recovery.lives)?;
        for ((name, ms), colour) in recovery.phases().iter().zip(COLOURS) {
            let width = 300.0 * ms / longest.max(1e-9);
            let style = format!("display:inline-block;height:1em;width:{width:.1}px;background:{colour}");
            write!(html, "<span title=\"{name} {ms:.1} ms\" style=\"{style}\"></span>")?;
        }
        write!(html, "</td><td>{}</td></tr>", escape(&recovery.causes.join("; ")))?;
    }
    html.push_str("</table>");
    Ok(html)
}

/// A line over the steps, as SVG, with a mark at each fault.
fn curve(points: &[(f64, f64)], faults: &[Kill]) -> Result<String> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let Some(last) = finite.last() else { return Ok("<p>no data</p>".to_owned()) };
    let top = finite.iter().fold(0.0f64, |m, (_, y)| m.max(*y)) * 1.05;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (900, 320)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..last.0.max(1.0), 0.0..top.max(1e-9))?;
        chart.configure_mesh().light_line_style(RGBColor(240, 240, 240)).x_desc("step").draw()?;
        let mark = |kill: &Kill| {
            let at = kill.step as f64;
            PathElement::new(vec![(at, 0.0), (at, top * 0.06)], RGBColor(204, 51, 51))
        };
        chart.draw_series(faults.iter().map(mark))?;
        chart.draw_series(LineSeries::new(finite.iter().copied(), RGBColor(30, 100, 200).stroke_width(2)))?;
        area.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::Target;

    #[test]
    fn faults_are_marked_on_the_curve() {
        let points: Vec<(f64, f64)> = (1..50).map(|n| (f64::from(n), 3.0 / f64::from(n))).collect();
        let fault = |step| Kill { time: 0, target: Target::Cut, step };
        let marks = |faults: &[Kill]| curve(&points, faults).unwrap().matches("#CC3333").count();
        assert_eq!([marks(&[]), marks(&[fault(7), fault(30)])], [0, 2]);
    }
}
