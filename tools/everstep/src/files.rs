//! Commands that start no job: they work on run folders and files.

use crate::weights::Which;
use crate::{bench, compare, data, eval, generate, hf, launcher, plan, range, read_config};
use anyhow::{Context, Result};
use clap::Subcommand;
use everstep_actors::RunFolder;
use std::path::PathBuf;
use std::process::ExitCode;

/// See the module.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a run whose first state is a Hugging Face checkpoint; go on with it by resume.
    Import {
        /// The folder with config.json and safetensors.
        folder: PathBuf,
        /// The configuration.
        config: PathBuf,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Write a checkpoint of a run as a folder that Hugging Face transformers loads.
    Export {
        /// The run folder.
        run: PathBuf,
        /// The folder to make.
        out: PathBuf,
        #[command(flatten)]
        which: Which,
        /// How weights are stored.
        #[arg(long, default_value = "bf16")]
        precision: hf::inventory::Precision,
    },
    /// Let a trained model write text.
    Generate {
        /// The run folder.
        run: PathBuf,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        choice: generate::Choice,
    },
    /// The loss and the perplexity of a checkpoint on held-out text.
    Eval {
        /// The run folder.
        run: PathBuf,
        #[command(flatten)]
        which: Which,
        /// Files and folders; those of `data.eval` by default.
        #[arg(long)]
        data: Vec<PathBuf>,
        /// Sequences that are looked at, evenly over the text.
        #[arg(long)]
        sequences: Option<u64>,
        /// Add the result to the run's eval.jsonl.
        #[arg(long, conflicts_with = "ema")]
        keep: bool,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// How close the smoothed losses of runs are over their last half.
    Compare {
        /// Run folders; the first is what the picture compares with.
        #[arg(required = true, num_args = 2..)]
        runs: Vec<PathBuf>,
        /// A picture to draw (SVG).
        #[arg(long)]
        picture: Option<PathBuf>,
        #[command(flatten)]
        bars: compare::Bars,
    },
    /// The tokens that steps are trained on, one JSON object for each micro-batch of a lane.
    Samples {
        /// The run folder.
        run: PathBuf,
        /// `A..B`: steps from A to B - 1.
        #[arg(long)]
        steps: String,
    },
    /// Logits of given texts, for comparison with other programs: a safetensors file with one tensor.
    Logits {
        /// The run folder.
        run: PathBuf,
        #[command(flatten)]
        which: Which,
        /// JSON: a list of lists of tokens, all of one length.
        #[arg(long)]
        tokens: PathBuf,
        /// The file to write: `logits`, texts by positions by vocabulary, f32.
        #[arg(long)]
        out: PathBuf,
    },
    /// What a configuration needs, without training.
    Plan {
        /// The configuration.
        config: PathBuf,
        /// List the tensors of an export in this precision instead: name, shape, type, bytes.
        #[arg(long)]
        inventory: Option<hf::inventory::Precision>,
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Measure: one JSON object per figure, with what bounds it and, where there is one, a peer.
    Bench {
        /// What; the CPU's products by default.
        #[command(subcommand)]
        what: Option<bench::What>,
        /// Every line is an object, with or without this.
        #[arg(long, global = true)]
        json: bool,
    },
}

/// Runs one.
pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Import { folder, config, mut set } => {
            set.push("run.imported=true".to_owned());
            let path = config;
            let mut config = read_config(&path, &set)?;
            if let Some(own) = data::of_folder(&folder, config.data.tokenizer.as_deref())? {
                set.push(format!("data.tokenizer={:?}", own.display().to_string()));
                config = read_config(&path, &set)?;
            }
            let source = hf::import::Source::open(&folder, &config.spec.model)?;
            let data = data::Data::prepare(&config)?;
            let run = launcher::create(&config, &data, |run, job| {
                data::keep_config(run, &folder)?;
                source.store(run, &config, job)
            })?;
            println!("imported {}; train it with: everstep resume {}", folder.display(), run.0.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Export { run, out, which, precision } => {
            let step = hf::export::export(&RunFolder(run), &out, which, precision)?;
            println!("exported step {step} to {}", out.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Generate { run, which, choice } => {
            generate::write(&RunFolder(run), which, &choice, &mut std::io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Eval { run, which, data, sequences, keep, json } => {
            let run = RunFolder(run);
            let found = eval::of_step(&run, which, &data, sequences)?;
            if keep {
                eval::keep(&run, &found)?;
            }
            if json {
                println!("{}", serde_json::to_string(&found)?);
            } else {
                println!(
                    "step {}: loss {:.4} nats, perplexity {:.3}, over {} tokens",
                    found.step, found.loss, found.perplexity, found.tokens
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Compare { runs, picture, bars } => {
            compare::run(&runs, picture.as_deref(), bars)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Logits { run, which, tokens, out } => {
            generate::logits(&RunFolder(run), which, &tokens, &out)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Samples { run, steps } => {
            data::samples(&RunFolder(run), range(&steps).context("--steps")?, &mut std::io::stdout().lock())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Plan { config, inventory, json, set } => plan::run(&read_config(&config, &set)?, inventory, json),
        Command::Bench { what, json: _ } => bench::run(what),
    }
}
