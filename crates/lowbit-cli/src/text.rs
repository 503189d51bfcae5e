//! Names and messages that come from files, made safe to print.

/// A name as a terminal may show it: control characters escaped, and the middle of a long one left out.
pub(crate) fn name(name: &str) -> String {
    /// Longer than any name that people give.
    const MOST: usize = 200;
    shortened(name, MOST)
}

/// A message, likewise: in one line, with no more of a hostile file in it than one can read.
pub(crate) fn message(message: &str) -> String {
    /// A screen full.
    const MOST: usize = 2000;
    shortened(message, MOST)
}

fn shortened(text: &str, most: usize) -> String {
    let half = most / 2;
    let (mut start, mut end) = (text.char_indices(), text.char_indices());
    match (start.nth(half), end.nth_back(half - 1)) {
        (Some((start, _)), Some((end, _))) if start < end => {
            let left_out = text[start..end].chars().count();
            let (start, end) = (escaped(&text[..start]), escaped(&text[end..]));
            format!("{start} … ({left_out} characters left out) … {end}")
        }
        _ => escaped(text),
    }
}

fn escaped(text: &str) -> String {
    let mut to = String::with_capacity(text.len());
    for c in text.chars() {
        // What moves the cursor, starts an escape sequence, or turns the direction of a line.
        let acts = c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        match acts {
            true => to.extend(c.escape_default()),
            false => to.push(c),
        }
    }
    to
}

/// `a, b or c`.
pub(crate) fn alternatives(all: &[String]) -> String {
    match all {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(name("a\u{1b}[2J\nb\u{9b}c\u{202e}d"), r"a\u{1b}[2J\nb\u{9b}c\u{202e}d");
        assert_eq!(name("gewöhnlich 普通 .weight"), "gewöhnlich 普通 .weight");
    }

    #[test]
    fn a_long_name_loses_its_middle() {
        let long = "é".repeat(200);
        assert_eq!(name(&long), long);
        let long = format!("a{}z", "é".repeat(65_534));
        let short = name(&long);
        assert!(short.starts_with("aéé") && short.ends_with("ééz"), "{short}");
        assert!(short.contains("(65336 characters left out)"), "{short}");
        assert!(short.chars().count() < 250);
    }

    #[test]
    fn alternatives_read_as_a_sentence() {
        let all = ["32", "64", "576"].map(String::from);
        assert_eq!(alternatives(&all), "32, 64 or 576");
        assert_eq!(alternatives(&all[..1]), "32");
    }
}
