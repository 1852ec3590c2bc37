//! The page as HTML: the picture, and the same text below it.

use super::{Report, text, timeline};

/// The whole page, with nothing to load.
pub fn page(report: &Report) -> String {
    let passed = report.objections().is_empty();
    let (word, colour) = if passed { ("passed", "#2a7") } else { ("failed", "#d33") };
    let title = format!("{} under {}: {word}", report.workloads.join(", "), report.nemesis);
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n\
         <style>body{{font-family:sans-serif;max-width:1240px;margin:1em auto}}pre{{overflow-x:auto}}</style>\n\
         <h1 style=\"color:{colour}\">{title}</h1>\n\
         <p>Each dot is a call: green acknowledged, grey certainly failed, red unknown. Bars are faults.</p>\n\
         {}\n<pre>{}</pre></html>\n",
        timeline::svg(&report.history),
        escape(&text::page(report))
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
