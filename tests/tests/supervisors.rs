//! Three supervisors on machines of their own (network namespaces): the one that leads is cut off, killed and stopped.

use anyhow::{Context, Result, bail};
use everstep_actors::{RunFolder, milliseconds};
use everstep_tests::{Place, Process, Wires, events, fingerprints, metrics, program, signal, wait};
use rustix::process::Signal;
use std::process::Stdio;
use std::time::Duration;

const STEPS: u64 = 900;
/// The bar is 3 s on a quiet machine; what it took is printed. Tests share a machine.
const LATE: Duration = Duration::from_secs(15);

struct Job {
    place: Place,
    wires: Wires,
    run: RunFolder,
    supervisors: Vec<Process>,
}

impl Job {
    fn start() -> Result<Self> {
        let (place, wires) = (Place::new()?, Wires::new(3)?);
        let set = [
            &format!("train.steps={STEPS}")[..],
            "checkpoint.every=100",
            "run.folder=run",
            "data.paths=[\"text.txt\"]",
        ];
        let set = set.iter().chain(&["job.nodes=3", "recovery.supervisors=3"]).flat_map(|s| ["--set", s]);
        let output = place.everstep(&["prepare", "tiny.toml"].into_iter().chain(set).collect::<Vec<_>>())?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        let mut job = Self { run: place.run("run"), place, wires, supervisors: Vec::new() };
        for number in 1..=3 {
            let supervisor = job.supervisor(number)?;
            job.supervisors.push(supervisor);
        }
        Ok(job)
    }

    fn among() -> String {
        [1, 2, 3].map(|n| format!("{}:7000", Wires::address(n))).join(",")
    }

    fn supervisor(&self, number: u32) -> Result<Process> {
        let mut command = self.wires.within(&format!("n{number}"), &program().display().to_string());
        command.current_dir(self.place.path()).args(["supervisor", "run", "--among", &Self::among(), "--number"]);
        command.arg(number.to_string()).stdout(Stdio::null()).stderr(self.log(&format!("supervisor-{number}"))?);
        Ok(Process(command.spawn()?))
    }

    /// Where a process says what goes wrong.
    fn log(&self, name: &str) -> Result<std::fs::File> {
        Ok(std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.place.path().join(name).with_extension("log"))?)
    }

    /// Nothing has failed yet: the first step of a job with three nodes.
    fn begins(&mut self) -> Result<()> {
        let began = wait("a first step", || {
            for number in 1..=3 {
                if self.ended(number)? {
                    bail!("supervisor {number} ended before the first step");
                }
            }
            Ok(self.step()? > 0)
        });
        began.with_context(|| {
            let names = (1..=3).flat_map(|n| [format!("supervisor-{n}.log"), format!("node-{n}.log")]);
            let said = names.map(|name| {
                let text = std::fs::read_to_string(self.place.path().join(&name)).unwrap_or_default();
                format!("{name}:\n{text}")
            });
            said.collect::<String>()
        })
    }

    fn node(&self, number: u32) -> Result<Process> {
        let mut command = self.wires.within("r", &program().display().to_string());
        command.current_dir(self.place.path()).args(["node", "--threads", "1", "--join", &Self::among()]);
        command.arg("--credentials").arg(self.run.credentials()).stdout(Stdio::null());
        command.stderr(self.log(&format!("node-{number}"))?);
        Ok(Process(command.spawn()?))
    }

    /// Who leads, from 1: metrics.jsonl stands for its copy.
    fn leader(&self) -> Option<u32> {
        std::fs::read_link(self.run.metrics()).ok()?.parent()?.file_name()?.to_string_lossy().parse().ok()
    }

    fn step(&self) -> Result<u64> {
        Ok(metrics(&self.run)?.last().map_or(0, |l| l.step))
    }

    /// Waits for steps more, then for another leader and a step of it, from now on. Gives who led.
    fn fails(&self, how: &str, fail: impl FnOnce(&Self, u32) -> Result<()>) -> Result<u32> {
        let at = self.step()? + 30;
        wait("steps", || Ok(self.step()? >= at))?;
        let old = self.leader().context("somebody leads")?;
        fail(self, old)?;
        let began = milliseconds();
        let first = || -> Result<Option<u64>> {
            let other = self.leader().is_some_and(|now| now != old);
            Ok(metrics(&self.run)?.into_iter().map(|l| l.time).find(|time| other && *time > began))
        };
        wait("another leader's first step", || Ok(first()?.is_some()))?;
        let took = Duration::from_millis(first()?.context("a step")? - began);
        println!("the leader {how}: another leads, its first step came after {} ms", took.as_millis());
        assert!(took < LATE, "{took:?}");
        Ok(old)
    }

    fn ended(&mut self, number: u32) -> Result<bool> {
        Ok(self.supervisors[number as usize - 1].0.try_wait()?.is_some())
    }

    /// As whoever runs the machine would.
    fn start_again(&mut self, number: u32) -> Result<()> {
        self.supervisors[number as usize - 1] = self.supervisor(number)?;
        Ok(())
    }
}

/// C1, RP-1, RP-2, RP-3, MA-1: whatever happens to who leads, another goes on, the old one changes nothing, and all have
/// the same lines.
#[test]
fn another_supervisor_leads() -> Result<()> {
    let mut job = Job::start()?;
    let _nodes = [job.node(1)?, job.node(2)?, job.node(3)?];
    job.begins()?;

    let old = job.fails("was cut off", |job, old| {
        [1, 2, 3].into_iter().filter(|n| *n != old).try_for_each(|other| job.wires.cut(old, other, true))
    })?;
    wait("the end of the one that was cut off", || job.ended(old))?;
    [1, 2, 3].into_iter().filter(|n| *n != old).try_for_each(|other| job.wires.cut(old, other, false))?;
    job.start_again(old)?;

    let old = job.fails("was killed", |job, old| {
        // `ip netns exec` becomes the program: it is the child itself.
        signal(job.supervisors[old as usize - 1].0.id(), Signal::KILL)
    })?;
    job.start_again(old)?;

    let old = job.fails("was stopped", |job, old| signal(job.supervisors[old as usize - 1].0.id(), Signal::STOP))?;
    let lines = std::fs::read(job.run.seat(u64::from(old)).join("metrics.jsonl"))?;
    signal(job.supervisors[old as usize - 1].0.id(), Signal::CONT)?;
    wait("the end of the one that was stopped", || job.ended(old))?;
    let after = std::fs::read(job.run.seat(u64::from(old)).join("metrics.jsonl"))?;
    assert!(after.starts_with(&lines));
    job.start_again(old)?;

    for number in 1..=3 {
        wait("the end of the job", || job.ended(number))?;
        assert!(job.supervisors[number as usize - 1].0.wait()?.success());
    }
    // No node was taken for dead meanwhile.
    assert!(events(&job.run, "node_dead")?.is_empty(), "{:?}", events(&job.run, "node_dead")?);
    assert!(events(&job.run, "supervisor_restarted")?.len() >= 3);
    let [first, second, third] =
        [1, 2, 3].map(|n| std::fs::read_to_string(job.run.seat(n).join("metrics.jsonl")).unwrap_or_default());
    assert!(first == second && second == third);
    let alone = job.place.train("alone", &[&format!("train.steps={STEPS}"), "checkpoint.every=500", "job.nodes=1"])?;
    assert_eq!(fingerprints(&job.run)?, fingerprints(&alone)?);
    Ok(())
}

/// C1, RP-1: three supervisors of one machine: the one that leads is killed and started again at once, stopped, and all
/// processes end together; a run that has ended may be gone on with, and has nothing to do.
#[test]
fn three_supervisors_of_a_launcher() -> Result<()> {
    let place = Place::new()?;
    let plan = "seed = 2\nkills = 4\nevery_ms = 2500\nstop_ms = 2000\n\
                targets = [\"supervisor\", \"stop-supervisor\", \"everything\", \"supervisor\"]\n";
    let set = ["train.steps=700", "checkpoint.every=100", "recovery.supervisors=3", "run.folder=three"];
    let said = place.with_plan(&["chaos", "plan.toml", "tiny.toml"], plan, &set)?;
    assert!(said.contains(" equal, 0 different"), "{said}");
    let run = place.run("three/chaos");
    let before = fingerprints(&run)?;
    let output = place.everstep(&["resume", &run.0.display().to_string()])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fingerprints(&run)?, before);
    // A supervisor that has lost its log has forgotten how it voted.
    std::fs::remove_file(run.seat(2).join("log"))?;
    let output = place.everstep(&["resume", &run.0.display().to_string()])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("this supervisor's log is gone"), "{said}");
    Ok(())
}
