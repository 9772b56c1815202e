//! The `everstep` program: trains, resumes, is a node, looks into a job, and proves that it works.

mod admin;
mod bench;
mod chaos;
mod compare;
mod data;
mod eval;
mod files;
mod fingerprint;
mod generate;
mod hf;
mod launcher;
mod panics;
mod plan;
mod progress;
mod recoveries;
mod report;
mod signals;
mod simulate;
mod tail;
mod tensorboard;
mod weights;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use everstep_actors::{
    ActorId, AdminRequest, Config, NodeEnd, NodeId, NodeOptions, RunFolder, Seat, SupervisorEnd, SupervisorOptions,
};
use launcher::{End, Launcher};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Of the program, with the commit of which it is built.
const VERSION: &str = env!("EVERSTEP_VERSION");
/// Exit status of a supervisor or node that ended for a reason that a restart would not change.
const STATUS_FAILED: u8 = 3;
/// Characters of a process's last words.
const WORDS_MAX: usize = 8192;
/// Exit status of a launcher's node that left on purpose: it is not started again.
const STATUS_LEFT: u8 = 4;

/// Elastic, fault-tolerant training of mixture-of-experts models: the same bits, whatever fails.
#[derive(Debug, Parser)]
#[command(version = VERSION)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a supervisor and local nodes, and train.
    Train {
        /// The configuration.
        config: PathBuf,
        /// Local nodes (0: wait for others to join); the configuration's `job.nodes` by default.
        #[arg(long)]
        nodes: Option<usize>,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Go on with a run from its control log and newest good checkpoint.
    Resume {
        /// The run folder.
        run: PathBuf,
        /// Local nodes; the configuration's `job.nodes` by default.
        #[arg(long)]
        nodes: Option<usize>,
    },
    /// Be a node of a job.
    Node {
        /// The supervisor's ADDRESS:PORT; of several supervisors those of all, with commas between.
        #[arg(long, value_delimiter = ',', required = true)]
        join: Vec<SocketAddr>,
        /// The folder of the job's credentials.
        #[arg(long)]
        credentials: PathBuf,
        /// Where this node listens for other nodes; by default at the address that faces the supervisor.
        #[arg(long)]
        listen: Option<SocketAddr>,
        /// Threads that compute; the machine's cores by default.
        #[arg(long)]
        threads: Option<usize>,
        /// What fails with this machine (a host, a rack, a zone): copies of the state are kept in different ones.
        #[arg(long, default_value = "")]
        domain: String,
        /// MiB that its actors may need, as planned (0: no limit). What fits nowhere waits for another node.
        #[arg(long, default_value_t = 0)]
        memory: u64,
        /// Leave when this file is there: a notice of preemption, which is heard like SIGTERM.
        #[arg(long, value_name = "FILE")]
        notice: Option<PathBuf>,
        /// End when this process ends.
        #[arg(long, hide = true)]
        parent: Option<u32>,
    },
    /// Make the folder of a run without training: for supervisors on several machines, which all need it.
    Prepare {
        /// The configuration.
        config: PathBuf,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Be a supervisor of a run. `train` and `resume` start those of this machine.
    Supervisor {
        /// The run folder.
        run: PathBuf,
        /// Where to listen; of several supervisors, the one of `--among` with this number by default.
        #[arg(long)]
        listen: Option<SocketAddr>,
        /// The ADDRESS:PORT of all supervisors, if there are several, in the same order everywhere.
        #[arg(long, value_delimiter = ',', requires = "number")]
        among: Vec<SocketAddr>,
        /// Which of them this is, from 1.
        #[arg(long, requires = "among")]
        number: Option<usize>,
        /// Nodes that the job waits for; the configuration's `job.nodes` by default.
        #[arg(long)]
        nodes: Option<usize>,
        /// End when this process ends.
        #[arg(long, hide = true)]
        parent: Option<u32>,
    },
    /// Look into a running job.
    Admin {
        /// The run folder; the newest under `runs/` by default.
        #[arg(long, global = true)]
        run: Option<PathBuf>,
        #[command(subcommand)]
        request: Admin,
    },
    /// Train while things fail, and compare every fingerprint with the undisturbed run.
    Chaos {
        /// The plan of the faults.
        plan: PathBuf,
        /// The configuration of a job to start.
        #[arg(required_unless_present = "attach", conflicts_with = "attach")]
        config: Option<PathBuf>,
        /// The run folder of a job that runs already.
        #[arg(long, value_name = "RUN")]
        attach: Option<PathBuf>,
        /// A run of the same job to compare fingerprints with.
        #[arg(long, value_name = "RUN", requires = "attach")]
        against: Option<PathBuf>,
        /// Override a key of the configuration.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Run the job's protocols under simulated time, network, disk and crashes.
    Simulate(simulate::Options),
    /// The fingerprint of a stored step, computed from its chunks.
    Fingerprint {
        /// The run folder.
        run: PathBuf,
        /// The step; the newest stored one by default.
        #[arg(long)]
        step: Option<u64>,
    },
    #[command(flatten)]
    Files(files::Command),
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Admin {
    /// Nodes and their actors.
    Tree,
    /// One actor's state.
    Inspect {
        /// For example stage.0.1, expert.2.3, reducer.0.1 or supervisor.
        actor: ActorId,
    },
    /// What failed, and how long each phase of the recovery took. The job need not run any more.
    Recoveries,
    /// Move everything away from a node; when it is empty its process ends, and is not started again.
    Drain {
        /// Its number: see tree.
        node: u64,
    },
    /// The ways of a node's sessions: QUIC, and why not RDMA, or with which device.
    Links {
        /// Its number: see tree.
        node: u64,
    },
    /// Make an actor panic: it is restarted, and the job goes on.
    Kill {
        /// The actor.
        actor: ActorId,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn,openraft=off".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.log_internal_errors(false).init();
    panics::say();
    let child =
        matches!(cli.command, Command::Supervisor { parent: Some(_), .. } | Command::Node { parent: Some(_), .. });
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            // The log may lie on a full disk: the launcher is told by another way too.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            if child {
                tell_launcher(&format!("{error:#}"));
            }
            ExitCode::from(STATUS_FAILED)
        }
    }
}

/// Last words by a pipe, which is read when this process has ended: more than it holds would never leave.
fn tell_launcher(words: &str) {
    let words: String = words.chars().take(WORDS_MAX).collect();
    // Whoever started it may not listen.
    let _ = writeln!(std::io::stdout(), "{words}");
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Train { config, nodes, mut set } => {
            // The job waits for as many nodes as it starts itself, or as the configuration says.
            set.extend(nodes.filter(|n| *n > 0).map(|n| format!("job.nodes={n}")));
            let config = read_config(&config, &set)?;
            let nodes = nodes.unwrap_or(config.nodes);
            if config.spec.imported {
                bail!("run.imported is set by everstep import, for the run that it makes: leave it out");
            }
            train(launcher::create(&config, &data::Data::prepare(&config)?, |_, _| Ok(()))?, nodes)
        }
        Command::Resume { run, nodes } => {
            let run = RunFolder(run);
            let path = run.config();
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("{} is no run folder: cannot read {}", run.0.display(), path.display()))?;
            let config = Config::parse(&text, &path.display().to_string(), &[])?;
            train(run, nodes.unwrap_or(config.nodes))
        }
        Command::Node { join, credentials, listen, threads, domain, memory, notice, parent } => {
            launcher::end_with(parent)?;
            keep_memory()?;
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let options = NodeOptions {
                join,
                listen,
                credentials,
                threads: threads.unwrap_or(cores),
                domain,
                memory: memory << 20,
                verified: parent.is_some(),
            };
            be_node(&options, notice, parent.is_some())
        }
        Command::Prepare { config, set } => {
            let config = read_config(&config, &set)?;
            let run = launcher::create(&config, &data::Data::prepare(&config)?, |_, _| Ok(()))?;
            println!("{}", run.0.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Supervisor { run, listen, among, number, nodes, parent } => {
            launcher::end_with(parent)?;
            be_supervisor(RunFolder(run), &seated(listen, among, number, nodes)?)
        }
        Command::Admin { run, request } => {
            let run = run.map_or_else(admin::newest_run, |run| Ok(RunFolder(run)))?;
            let ask = |request| runtime(1)?.block_on(admin::ask(&run, request));
            let text = match request {
                Admin::Tree => ask(AdminRequest::Tree),
                Admin::Inspect { actor } => ask(AdminRequest::Inspect(actor)),
                Admin::Links { node } => ask(AdminRequest::Links(NodeId(node))),
                Admin::Drain { node } => ask(AdminRequest::Drain(NodeId(node))),
                Admin::Kill { actor } => ask(AdminRequest::Kill(actor)),
                Admin::Recoveries => Ok(recoveries::table(&recoveries::among(&recoveries::events(&run)?)?)),
            }?;
            println!("{}", text.trim_end());
            Ok(ExitCode::SUCCESS)
        }
        Command::Chaos { plan, attach: Some(run), against, .. } => {
            chaos::attach(&plan, RunFolder(run), against.map(RunFolder))
        }
        Command::Chaos { plan, config, set, .. } => chaos::run(&plan, &config.context("CONFIG")?, &set),
        Command::Simulate(options) => simulate::run(&options),
        Command::Fingerprint { run, step } => {
            println!("{}", fingerprint::of_step(&RunFolder(run), step)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Files(command) => files::run(command),
    }
}

/// What is shown of a model at the end of its training.
fn sample() -> generate::Choice {
    generate::Choice { prompt: "//! ".to_owned(), tokens: 300, temperature: 0.7, top_p: 1.0, seed: 1 }
}

/// `A..B` as numbers.
fn range(text: &str) -> Result<std::ops::Range<u64>> {
    let parts = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let (from, to): (u64, u64) = parts.with_context(|| format!("{text:?}: expected A..B"))?;
    if from >= to {
        bail!("{text:?} is empty");
    }
    Ok(from..to)
}

fn runtime(threads: usize) -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?)
}

fn read_config(path: &Path, set: &[String]) -> Result<Config> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Config::parse(&text, &path.display().to_string(), set)?)
}

/// Trains a run folder to its end, and shows what came of it.
fn train(run: RunFolder, nodes: usize) -> Result<ExitCode> {
    let end = Launcher::start(run.clone(), nodes, true)?.wait(|_| {})?;
    match end {
        End::Finished => {
            report::write(&run)?;
            let mut text = Vec::new();
            match generate::write(&run, weights::Which::default(), &sample(), &mut text) {
                Ok(()) => println!("{}", String::from_utf8_lossy(&text)),
                // The training is done, whatever a sample says.
                Err(error) => eprintln!("there is no sample: {error:#}"),
            }
            println!("\nreport: {}\nrun:    {}", run.report().display(), run.0.display());
            Ok(ExitCode::SUCCESS)
        }
        End::Failed(why) => bail!("{why}"),
        End::Interrupted(signal) => {
            eprintln!("stopped; go on with: everstep resume {}", run.0.display());
            Ok(ExitCode::from(128 + signal))
        }
    }
}

/// Starts this process anew with an allocator that gives no memory back: a step needs the same pieces as
/// the one before, and fresh pages cost a node a fifth of its speed. The allocator reads its options first.
fn keep_memory() -> Result<()> {
    const OPTION: &str = "MIMALLOC_PURGE_DELAY";
    if std::env::var_os(OPTION).is_some() {
        return Ok(());
    }
    let mut again = std::process::Command::new(std::env::current_exe()?);
    // What is only reserved is not committed: a limit of memory is one of what is used.
    again.args(std::env::args_os().skip(1)).env(OPTION, "-1").env("MIMALLOC_ARENA_EAGER_COMMIT", "0");
    let error = again.exec();
    Err(error).context("cannot start again")
}

/// How a supervisor was told to be.
fn seated(
    listen: Option<SocketAddr>,
    among: Vec<SocketAddr>,
    number: Option<usize>,
    nodes: Option<usize>,
) -> Result<SupervisorOptions> {
    let Some(number) = number else {
        let listen =
            listen.context("--listen is missing: expected the ADDRESS:PORT at which nodes find the supervisor")?;
        return Ok(SupervisorOptions { listen, nodes, seat: None });
    };
    let own = number.checked_sub(1).and_then(|at| among.get(at)).copied();
    let own = own.with_context(|| format!("--number {number}: expected 1 to {}, as --among has", among.len()))?;
    let seat = Some(Seat { number: number as u64, addresses: among });
    Ok(SupervisorOptions { listen: listen.unwrap_or(own), nodes, seat })
}

/// A supervisor of a job, until it is over or another one leads.
fn be_supervisor(run: RunFolder, options: &SupervisorOptions) -> Result<ExitCode> {
    match runtime(2)?.block_on(everstep_actors::run_supervisor(run, options)) {
        Ok(SupervisorEnd::Finished) => Ok(ExitCode::SUCCESS),
        Ok(SupervisorEnd::Failed(why)) => bail!("{why}"),
        Ok(SupervisorEnd::Panicked) => Ok(ExitCode::FAILURE),
        Ok(SupervisorEnd::Deposed(why)) => {
            eprintln!("this supervisor does not lead any more: {why}");
            tell_launcher(&why);
            Ok(ExitCode::FAILURE)
        }
        Err(error) => bail!("{error}"),
    }
}

/// A notice of preemption is looked for so often: clouds give half a minute at least.
const NOTICE_EVERY: Duration = Duration::from_millis(500);

/// A node of a job; when it is fenced, the process joins as a new one.
fn be_node(options: &NodeOptions, notice: Option<PathBuf>, launched: bool) -> Result<ExitCode> {
    // The runtime passes messages on beside threads that compute on every core: more than a quarter as many threads
    // would wake each other and take turns with those.
    let threads = (options.threads / 4).clamp(1, 8);
    // Heard in all lives of the node, and between them. These end with their runtimes: nothing of one is left in the next.
    let (sender, told) = tokio::sync::watch::channel(0u32);
    let sender = Arc::new(sender);
    if let Some(notice) = notice {
        let sender = Arc::clone(&sender);
        std::thread::Builder::new().name("notice".to_owned()).spawn(move || {
            while !notice.exists() {
                std::thread::sleep(NOTICE_EVERY);
            }
            eprintln!("{} is there: this node is to leave", notice.display());
            // The SIGTERM that may follow is the same wish.
            sender.send_modify(|times| *times = (*times).max(1));
        })?;
    }
    let listening = runtime(1)?;
    let mut signals = {
        let _guard = listening.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
    };
    listening.spawn(async move {
        let mut heard = 0;
        while signals.recv().await.is_some() {
            heard += 1;
            sender.send_modify(|times| *times = heard);
        }
    });
    loop {
        match runtime(threads)?.block_on(everstep_actors::run_node(options, told.clone())) {
            Ok(NodeEnd::Fenced) => eprintln!("this node is not a member any more: it joins as new"),
            Ok(NodeEnd::Left) => {
                eprintln!("the node leaves");
                return Ok(if launched { ExitCode::from(STATUS_LEFT) } else { ExitCode::SUCCESS });
            }
            Ok(NodeEnd::Dismissed(why)) => {
                eprintln!("the node ends: {why}");
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) => bail!("{error}"),
        }
    }
}
