//! The `lowbit` command: quantize, inspect, compare, evaluate and run language models.
#![forbid(unsafe_code)]

mod bench;
mod compare;
mod eval;
mod generate;
mod inspect;
mod model;
mod new_file;
mod outliers;
mod plot;
mod quantize;
mod scheme;
mod text;

use std::{io::Write, num::NonZeroUsize, process::ExitCode, sync::Arc};

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use lowbit::Context;

/// Quantize language models and see what it costs and gains.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Quantize a model by every method, and show size, loss and speed in a table
    Compare(compare::Options),
    /// Quantize a checkpoint into another one
    Quantize(quantize::Options),
    /// What is in a file or a folder: layers, schemes, sizes, damage
    Inspect(inspect::Options),
    /// Perplexity of a model on a text
    Eval(eval::Options),
    /// Which features of a model's activations are outliers
    Outliers(outliers::Options),
    /// Continue a text
    Generate(generate::Options),
    /// Measure what this machine does
    Bench(bench::Options),
}

/// The threads to compute on.
#[derive(Args)]
struct Threads {
    /// Threads to compute on [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

/// More than any machine has cores, and few enough to start at once.
const MOST_THREADS: usize = 1024;

/// So many times the cores, threads only get in each other's way.
const MANY_THREADS: usize = 8;

impl Threads {
    fn context(&self) -> Result<Context> {
        let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let threads = self.threads.unwrap_or_else(cores).get();
        ensure!(threads <= MOST_THREADS, "--threads {threads}: at most {MOST_THREADS}");
        let cores = cores().get();
        if threads > MANY_THREADS * cores {
            note(&format!("{threads} threads on {cores} cores are slower than {cores}"));
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        Ok(Context::with_pool(Arc::new(pool)))
    }
}

/// A bar on standard error; invisible where that is not a terminal.
fn progress(steps: usize, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:28} {wide_bar} {pos}/{len} {eta:>4}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style).with_message(what.to_string())
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if !e.use_stderr() => e.exit(), // --help and --version
        Err(e) => {
            complain(&one_line(&e.render().to_string()));
            return ExitCode::from(2);
        }
    };
    let result = match cli.command {
        Command::Compare(options) => compare::run(&options),
        Command::Quantize(options) => quantize::run(&options),
        Command::Inspect(options) => inspect::run(&options),
        Command::Eval(options) => eval::run(&options),
        Command::Outliers(options) => outliers::run(&options),
        Command::Generate(options) => generate::run(&options),
        Command::Bench(options) => bench::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, such as `head`, is no error.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(broken_pipe) => ExitCode::SUCCESS,
        Err(e) => {
            complain(&format!("lowbit: {e:#}"));
            ExitCode::from(2)
        }
    }
}

/// Says on standard error what is no error, and yet not as somebody might think.
fn note(text: &str) {
    complain(&format!("lowbit: {text}"));
}

/// `1 token`, `2 tokens`.
fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Writes to standard error, which may be closed or full: the exit code says it, too.
fn complain(message: &str) {
    let _ = writeln!(std::io::stderr(), "{}", text::message(message));
}

fn broken_pipe(e: &std::io::Error) -> bool {
    e.kind() == std::io::ErrorKind::BrokenPipe
}

/// What is wrong, without the usage that clap adds in further paragraphs.
fn one_line(message: &str) -> String {
    let wrong = message.split("\n\n").next().unwrap_or(message);
    let words: Vec<_> = wrong.trim_start_matches("error: ").split_whitespace().collect();
    format!("lowbit: {}; see --help", words.join(" "))
}
