//! A small machine with RDMA devices in software, on QEMU's emulated processor: Debian's kernel, and everything else the host's.
//!
//! The first use sets it up under `target/vm`: Debian's kernel is fetched and unpacked (not installed), and the module for iWARP,
//! which that kernel lacks, is built from its source. In the machine the host's files are seen read-only at their places, with a layer
//! in memory, so that what was built here runs there; `rxe0` (RoCE) is at 10.99.0.1 and `siw0` (iWARP) at 10.99.1.1. Of two machines that run
//! together number N is at 10.98.0.N and 10.98.1.N, on wires `wire0` and `wire1` between them.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the kernel needs before it sees the host's files, in this order.
const EARLY: &[&str] = &["virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay"];
/// What it needs then.
const LATE: &[&str] = &[
    "virtio_net",
    "dummy",
    "sch_netem",
    "crc32_generic",
    "crc32c_generic",
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
    "siw",
];
const MEMORY_MB: u32 = 1024;
/// Wires between two machines.
const WIRES: u32 = 2;

/// What ran in it.
#[derive(Debug)]
pub struct Ran {
    /// The command's exit status.
    pub status: i32,
    /// What it wrote, both streams.
    pub output: String,
}

/// The machine: it is started anew for each command.
#[derive(Debug)]
pub struct Vm {
    folder: PathBuf,
    release: String,
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn sh(folder: &Path, line: &str) -> Result<String> {
    run(Command::new("sh").args(["-ec", line]).current_dir(folder))
}

impl Vm {
    /// Sets it up, if it is not; one process at a time does.
    pub fn set_up() -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm");
        fs::create_dir_all(&folder)?;
        let folder = folder.canonicalize()?;
        let lock = fs::File::create(folder.join("lock"))?;
        lock.lock()?;
        let package = sh(&folder, "apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2 }'")?;
        let release = package.trim().trim_start_matches("linux-image-").to_owned();
        if release.is_empty() {
            bail!("apt knows no kernel: is `linux-image-amd64` in its lists? (apt-get update)");
        }
        let vm = Self { folder, release };
        let ready = vm.folder.join("ready");
        // What changes it: the kernel, and the files beside it.
        let made_of = format!("{} {}{}", vm.release, include_str!("../vm/init"), EARLY.join(" ") + &LATE.join(" "));
        if fs::read_to_string(&ready).is_ok_and(|made| made == made_of) {
            return Ok(vm);
        }
        vm.kernel()?;
        vm.iwarp()?;
        vm.initial()?;
        fs::write(ready, made_of)?;
        Ok(vm)
    }

    fn kernel(&self) -> Result<()> {
        let release = &self.release;
        sh(
            &self.folder,
            &format!("rm -rf kernel *.deb; apt-get download linux-image-{release}; dpkg -x linux-image-*.deb kernel"),
        )?;
        Ok(())
    }

    /// Builds the module `siw` with the kernel's own build files, which want to be in their place.
    fn iwarp(&self) -> Result<()> {
        let release = &self.release;
        let version = release.split('.').take(2).collect::<Vec<_>>().join(".");
        let common = release.replace("-amd64", "-common");
        let lines = format!(
            "rm -rf siw headers
            apt-get download linux-headers-{release} linux-headers-{common} linux-kbuild-{version} linux-source-{version}
            for part in headers-{release} headers-{common} kbuild-{version} source-{version}; do
                dpkg -x linux-${{part}}_*.deb headers
            done
            sed -i \"s#/usr/src/#$PWD/headers/usr/src/#\" headers/usr/src/linux-headers-{release}/Makefile
            mkdir siw
            tar -C siw --strip-components=5 -xJf headers/usr/src/linux-source-{version}.tar.xz \\
                linux-source-{version}/drivers/infiniband/sw/siw
            make -s -C headers/usr/src/linux-headers-{release} M=$PWD/siw CONFIG_RDMA_SIW=m modules
            strip -d siw/siw.ko
            mkdir -p kernel/lib/modules/{release}/extra
            cp siw/siw.ko kernel/lib/modules/{release}/extra
            rm -rf headers siw *.deb
            depmod -b kernel {release}"
        );
        sh(&self.folder, &lines)?;
        Ok(())
    }

    /// Files of the modules and of what they need, in the order in which they can be loaded.
    fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for name in names {
            let of = self.folder.join("kernel");
            let shown =
                run(Command::new("modprobe").arg("-d").arg(of).args(["-S", &self.release, "--show-depends", name]))?;
            // A line: `insmod FILE OPTIONS`.
            let file = |line: &str| Some(line.strip_prefix("insmod ")?.split_inclusive(".ko").next()?.to_owned());
            for file in shown.lines().filter_map(file) {
                let file = PathBuf::from(file);
                // Some need instructions that the machine has not, and another does it then.
                if !files.contains(&file) && !file.ends_with("crc32c-intel.ko") {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }

    fn copy(files: &[PathBuf], to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        for (n, file) in files.iter().enumerate() {
            let name = file.file_name().context("a module's file")?.to_string_lossy();
            fs::copy(file, to.join(format!("{n:02}-{name}")))?;
        }
        Ok(())
    }

    /// The first file system: what finds the host's.
    fn initial(&self) -> Result<()> {
        let root = self.folder.join("initial");
        let _ = fs::remove_dir_all(&root);
        for folder in ["bin", "dev", "proc", "sys", "host", "layer", "root"] {
            fs::create_dir_all(root.join(folder))?;
        }
        let (early, mut late) = (self.modules(EARLY)?, self.modules(LATE)?);
        late.retain(|file| !early.contains(file));
        Self::copy(&early, &root.join("modules"))?;
        let _ = fs::remove_dir_all(self.folder.join("modules"));
        Self::copy(&late, &self.folder.join("modules"))?;
        fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        fs::write(root.join("init"), include_str!("../vm/init"))?;
        sh(&root, "chmod +x init; find . | busybox cpio -o -H newc | gzip -1 > ../initial.gz")?;
        Ok(())
    }

    /// Runs a line of shell in it, in this folder; kills the machine when it takes longer than `limit`.
    pub fn run(&self, line: &str, limit: Duration) -> Result<Ran> {
        let share = tempfile::tempdir()?;
        let machine = self.start(line, share.path(), 1, &[])?;
        finish(machine, share.path(), Instant::now() + limit)
    }

    /// Runs two lines in two machines with wires between them, at the same time.
    pub fn run_two(&self, lines: [&str; 2], limit: Duration) -> Result<[Ran; 2]> {
        let (wires, until) = (tempfile::tempdir()?, Instant::now() + limit);
        let mut started = Vec::new();
        for (number, line) in (1..).zip(lines) {
            let mut network = Vec::new();
            for wire in 0..WIRES {
                let path = |of: u32| wires.path().join(format!("{wire}-{of}")).display().to_string();
                let (mine, other) = (path(number), path(3 - number));
                network.extend([
                    "-netdev".to_owned(),
                    format!("dgram,id=w{wire},local.type=unix,local.path={mine},remote.type=unix,remote.path={other}"),
                    "-device".to_owned(),
                    format!("virtio-net-pci,netdev=w{wire},mac=52:54:00:00:0{wire}:0{number}"),
                ]);
            }
            let share = tempfile::tempdir()?;
            let machine = self.start(line, share.path(), number, &network)?;
            started.push((machine, share));
        }
        let ran = started.into_iter().map(|(machine, share)| finish(machine, share.path(), until));
        // The second is waited for even if the first went wrong.
        let [first, second] = <[_; 2]>::try_from(ran.collect::<Vec<_>>()).expect("two were started");
        Ok([first?, second?])
    }

    /// Starts it with what is shared with it, and arguments for its network.
    fn start(&self, line: &str, share: &Path, number: u32, network: &[String]) -> Result<Machine> {
        sh(share, &format!("cp -r {}/modules .", self.folder.display()))?;
        let here = std::env::current_dir()?;
        fs::write(share.join("start"), format!("NUMBER={number}\n{}", include_str!("../vm/start")))?;
        fs::write(share.join("command"), format!("cd '{}'\n{line}\n", here.display()))?;
        let kernel = self.folder.join(format!("kernel/boot/vmlinuz-{}", self.release));
        let machine = Command::new("qemu-system-x86_64")
            // A processor without virtual machines of its own may still have /dev/kvm: it would hang.
            .args(["-accel", "tcg,thread=multi", "-smp", "2", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-m", &MEMORY_MB.to_string(), "-append", "console=ttyS0 panic=-1 quiet"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(self.folder.join("initial.gz"))
            .args(["-serial", &format!("file:{}", share.join("console").display())])
            .args(["-device", "virtio-serial-pci", "-chardev", "stdio,id=out", "-device", "virtconsole,chardev=out"])
            .args(["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"])
            .args(["-virtfs", &format!("local,path={},mount_tag=vm,security_model=none", share.display())])
            .args(network)
            .stdin(Stdio::null())
            .stdout(fs::File::create(share.join("output"))?)
            .stderr(fs::File::create(share.join("qemu"))?)
            .spawn()
            .context("qemu-system-x86_64 (package qemu-system-x86)")?;
        Ok(Machine(machine))
    }
}

/// Ends with whoever holds it.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn finish(mut machine: Machine, share: &Path, until: Instant) -> Result<Ran> {
    while machine.0.try_wait()?.is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(machine);
    let read =
        |name: &str| fs::read(share.join(name)).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    match read("status").trim().parse() {
        Ok(status) => Ok(Ran { status, output: read("output") }),
        Err(_) => bail!(
            "the machine ended without a status, or it took too long\n{}\n{}\n{}",
            read("output"),
            read("console"),
            read("qemu")
        ),
    }
}
