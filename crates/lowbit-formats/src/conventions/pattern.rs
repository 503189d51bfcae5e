//! Patterns of layers' names: the part of Python's `re` that configurations use.
//!
//! A pattern becomes a program, run over all ways through it at once: each place of the program sees each
//! place of the name once, so that no pattern takes more than `program · name` steps.

/// The longest program; `{m,n}` repeats its part so often.
const LONGEST: usize = 10_000;

/// A pattern that is matched from the start of a name, as `re.match` does.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pattern(Vec<Op>);

#[derive(Clone, Debug, PartialEq)]
enum Op {
    /// A character of these.
    One(Class),
    /// Here and so far behind here.
    Split(isize),
    Jump(isize),
    Start,
    End,
    /// Between a letter of a word and another one, or not.
    Boundary(bool),
    /// What follows matches, or does not.
    Look(bool, Vec<Self>),
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Class {
    negated: bool,
    ranges: Vec<(char, char)>,
}

impl Class {
    fn contains(&self, c: char) -> bool {
        self.ranges.iter().any(|&(from, to)| (from..=to).contains(&c)) != self.negated
    }
}

impl Pattern {
    /// Parses a pattern; a reason for one that is not understood.
    pub(super) fn new(text: &str) -> Result<Self, String> {
        let mut parser = Parser { rest: text.chars().collect(), depth: 0 };
        parser.rest.reverse();
        let program = parser.alternatives()?;
        match parser.rest.last() {
            None => Ok(Self(program)),
            Some(_) => Err("a ) without (".into()),
        }
    }

    /// Does a start of `name` match?
    pub(super) fn matches(&self, name: &str) -> bool {
        run(&self.0, &name.chars().collect::<Vec<_>>(), 0)
    }
}

fn word(c: Option<&char>) -> bool {
    c.is_some_and(|c| c.is_alphanumeric() || *c == '_')
}

fn run(program: &[Op], text: &[char], start: usize) -> bool {
    let width = text.len() + 1;
    let mut seen = vec![false; (program.len() + 1) * width];
    let mut todo = vec![(0_usize, start)];
    while let Some((at, place)) = todo.pop() {
        if at == program.len() {
            return true;
        }
        if std::mem::replace(&mut seen[at * width + place], true) {
            continue;
        }
        let before = place.checked_sub(1).and_then(|place| text.get(place));
        let holds = match &program[at] {
            Op::One(class) => {
                if text.get(place).is_some_and(|&c| class.contains(c)) {
                    todo.push((at + 1, place + 1));
                }
                false
            }
            Op::Split(by) => {
                todo.push((at.saturating_add_signed(*by), place));
                true
            }
            Op::Jump(by) => {
                todo.push((at.saturating_add_signed(*by), place));
                false
            }
            Op::Start => place == 0,
            Op::End => place == text.len(),
            Op::Boundary(expected) => (word(before) != word(text.get(place))) == *expected,
            Op::Look(expected, program) => run(program, text, place) == *expected,
        };
        if holds {
            todo.push((at + 1, place));
        }
    }
    false
}

/// The rest of a pattern, last character first.
struct Parser {
    rest: Vec<char>,
    depth: usize,
}

impl Parser {
    fn take(&mut self, c: char) -> bool {
        self.rest.pop_if(|next| *next == c).is_some()
    }

    fn alternatives(&mut self) -> Result<Vec<Op>, String> {
        let first = self.sequence()?;
        if !self.take('|') {
            return Ok(first);
        }
        let second = self.alternatives()?;
        let mut all = vec![Op::Split(first.len() as isize + 2)];
        all.extend(first);
        all.push(Op::Jump(second.len() as isize + 1));
        all.extend(second);
        Ok(all)
    }

    fn sequence(&mut self) -> Result<Vec<Op>, String> {
        let mut all = Vec::new();
        while self.rest.last().is_some_and(|next| !matches!(next, '|' | ')')) {
            let part = self.part()?;
            all.extend(self.repeated(part)?);
            if all.len() > LONGEST {
                return Err("it is too long".into());
            }
        }
        Ok(all)
    }

    fn part(&mut self) -> Result<Vec<Op>, String> {
        let any = Class { negated: true, ranges: vec![('\n', '\n')] };
        Ok(vec![match self.rest.pop() {
            Some('.') => Op::One(any),
            Some('^') => Op::Start,
            Some('$') => Op::End,
            Some('[') => Op::One(self.class()?),
            Some('\\') => self.escape()?,
            Some('(') => return self.group(),
            Some(c @ ('*' | '+' | '?' | '{')) => return Err(format!("nothing before {c}")),
            Some(c) => Op::One(Class { negated: false, ranges: vec![(c, c)] }),
            None => return Err("it ends too early".into()),
        }])
    }

    fn group(&mut self) -> Result<Vec<Op>, String> {
        self.depth += 1;
        if self.depth > 100 {
            return Err("its parentheses are too deep".into());
        }
        let mut look = None;
        if self.take('?') {
            match self.rest.pop() {
                Some(':') => {}
                Some('=') => look = Some(true),
                Some('!') => look = Some(false),
                _ => return Err("a group of another kind than (?: (?= (?!".into()),
            }
        }
        let inner = self.alternatives()?;
        self.depth -= 1;
        if !self.take(')') {
            return Err("a ( without )".into());
        }
        Ok(match look {
            None => inner,
            Some(expected) => vec![Op::Look(expected, inner)],
        })
    }

    fn repeated(&mut self, part: Vec<Op>) -> Result<Vec<Op>, String> {
        let (least, most) = match self.rest.last() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => {
                self.rest.pop();
                let least = self.number();
                let most = if self.take(',') { self.number() } else { least };
                if self.rest.last() != Some(&'}') || (least.is_none() && most.is_none()) {
                    return Err("a { without numbers and }".into());
                }
                (least.unwrap_or(0), most)
            }
            _ => return Ok(part),
        };
        self.rest.pop();
        // Which of the ways is tried first does not matter to whether one matches.
        self.take('?');
        if self.rest.last().is_some_and(|next| matches!(next, '*' | '+' | '?' | '{')) {
            return Err("a repetition of a repetition".into());
        }
        let times = most.unwrap_or(least + 1).max(least);
        if part.len().saturating_add(2).saturating_mul(times) > LONGEST {
            return Err("it is too long".into());
        }
        let len = part.len() as isize;
        let mut all: Vec<_> = std::iter::repeat_n(&part, least).flatten().cloned().collect();
        match most {
            None => {
                all.push(Op::Split(len + 2));
                all.extend(part);
                all.push(Op::Jump(-len - 1));
            }
            Some(most) => {
                for left in (1..=most.saturating_sub(least) as isize).rev() {
                    all.push(Op::Split(left * (len + 1)));
                    all.extend_from_slice(&part);
                }
            }
        }
        Ok(all)
    }

    fn number(&mut self) -> Option<usize> {
        let mut digits = String::new();
        while let Some(digit) = self.rest.pop_if(|next| next.is_ascii_digit()) {
            digits.push(digit);
        }
        digits.parse().ok()
    }

    fn escape(&mut self) -> Result<Op, String> {
        match self.rest.pop() {
            Some('b') => Ok(Op::Boundary(true)),
            Some('B') => Ok(Op::Boundary(false)),
            Some('A') => Ok(Op::Start),
            Some('Z') => Ok(Op::End),
            Some(c) => Ok(Op::One(escaped(c)?)),
            None => Err("it ends with \\".into()),
        }
    }

    fn class(&mut self) -> Result<Class, String> {
        let mut class = Class { negated: self.take('^'), ranges: Vec::new() };
        loop {
            let from = match self.rest.pop() {
                None => return Err("a [ without ]".into()),
                Some(']') if !class.ranges.is_empty() => return Ok(class),
                Some('\\') => {
                    let c = self.rest.pop().ok_or("it ends with \\")?;
                    let inner = escaped(c)?;
                    match inner.ranges[..] {
                        _ if inner.negated => return Err(format!("\\{c} in [ ]")),
                        [(a, b)] if a == b => a,
                        _ => {
                            class.ranges.extend(inner.ranges);
                            continue;
                        }
                    }
                }
                Some(c) => c,
            };
            let range = self.rest.last() == Some(&'-')
                && self.rest.len().checked_sub(2).is_some_and(|at| self.rest[at] != ']');
            if !range {
                class.ranges.push((from, from));
                continue;
            }
            self.rest.pop();
            match self.rest.pop() {
                Some(to) if to != '\\' && from <= to => class.ranges.push((from, to)),
                _ => return Err("a range without an end".into()),
            }
        }
    }
}

/// What `\c` stands for.
fn escaped(c: char) -> Result<Class, String> {
    let digits = vec![('0', '9')];
    let spaces = vec![('\t', '\r'), (' ', ' ')];
    let words = vec![('a', 'z'), ('A', 'Z'), ('0', '9'), ('_', '_')];
    let (negated, ranges) = match c {
        'd' => (false, digits),
        'D' => (true, digits),
        'w' => (false, words),
        'W' => (true, words),
        's' => (false, spaces),
        'S' => (true, spaces),
        c if !c.is_ascii_alphanumeric() => (false, vec![(c, c)]),
        c => return Err(format!("\\{c}")),
    };
    Ok(Class { negated, ranges })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python 3.11 answers to `bool(re.match(pattern, name))`.
    #[test]
    fn patterns_match_where_those_of_python_do() {
        let name = "model.layers.10.mlp.down_proj";
        for (pattern, expected) in [
            (".*down_proj$", true),
            (".*down_proj", true),
            ("down_proj", false),
            ("model", true),
            ("model$", false),
            (r".*layers\.(1|10)\..*", true),
            (r".*layers\.1\..*", false),
            (r".*layers\.[0-9]+\.(?:mlp|attn)\.", true),
            (r"^(?!.*layers\.10).*$", false),
            (r"^(?!.*layers\.3\.).*$", true),
            (r"(?=.*mlp)model\.", true),
            (r".*\blayers\b", true),
            (r".*\bayers\b", false),
            (r".*\.\d{2}\.", true),
            (r".*\.\d{3,}\.", false),
            (r".*\.\d{1,3}\.mlp", true),
            (r"model\.layers\.\d?\d?\.", true),
            (r"[a-m.]*x", false),
            (r"[^.]+\.[^.]+\.[^.]+\.mlp", true),
            (r"(a|b|)model", true),
            (r".*[.]mlp[.]", true),
            (r".*[\w.]proj", true),
            ("(x*)*m", true),
            ("", true),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().matches(name), expected, "{pattern}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for pattern in [
            "(", ")", "[", "*", "a**", r"(a)\1", "(?<=a)b", "(?i)a", "a{", "a{99999}", r"\",
            r"[a\D]",
        ] {
            assert!(Pattern::new(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn patterns_that_explode_elsewhere_end_at_once() {
        let pattern = Pattern::new("(a*)*(a*)*(a*)*(a?){50}b").unwrap();
        assert!(!pattern.matches(&"a".repeat(500)));
    }
}
