//! An S3 server of a process of its own (moto), behind a door that can be shut.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What the door does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Door {
    /// Lets them through.
    Open,
    /// Hangs up.
    Shut,
    /// Lets them through, a piece every tenth of a second.
    Slow,
    /// Refuses to write: there is no space.
    Full,
}

/// Bytes that go through at one time.
const PIECE: usize = 16 << 10;

#[derive(Debug)]
struct State {
    door: AtomicU8,
    /// Chunks that were written.
    chunks: AtomicU64,
}

impl State {
    fn is(&self, door: Door) -> bool {
        self.door.load(Ordering::Relaxed) == door as u8
    }
}

/// See the module. Ends with its value.
#[derive(Debug)]
pub struct Bucket {
    server: Child,
    address: SocketAddr,
    state: Arc<State>,
}

impl Bucket {
    /// Starts the server, with a bucket called `bucket`.
    pub fn start() -> Result<Self> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/python/bin/moto_server");
        let mut server = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}: `make test` installs it", program.display()))?;
        let mut lines = BufReader::new(server.stderr.take().context("its words")?).lines();
        let line = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("Running on http://")?;
            rest.split_whitespace().next()?.parse::<SocketAddr>().ok()
        });
        // It goes on to say what it is asked: nobody else reads that.
        std::thread::spawn(move || lines.for_each(drop));
        let behind = line.context("the S3 server did not say where it is")?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State { door: AtomicU8::new(Door::Open as u8), chunks: AtomicU64::new(0) });
        let bucket = Self { server, address, state: Arc::clone(&state) };
        std::thread::spawn(move || {
            for visitor in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                std::thread::spawn(move || serve(visitor, behind, &state));
            }
        });
        bucket.create()?;
        Ok(bucket)
    }

    fn create(&self) -> Result<()> {
        let mut stream = TcpStream::connect(self.address)?;
        stream
            .write_all(b"PUT /bucket HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { bail!("the bucket was not made: {answer}") }
    }

    /// What the program needs to know.
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.address);
        let all = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ];
        all.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// Changes the door, for connections that are there too.
    pub fn door(&self, door: Door) {
        self.state.door.store(door as u8, Ordering::Relaxed);
    }

    /// Chunks that were written so far.
    pub fn chunks(&self) -> u64 {
        self.state.chunks.load(Ordering::Relaxed)
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn serve(visitor: TcpStream, behind: SocketAddr, state: &Arc<State>) {
    let Ok(server) = TcpStream::connect(behind) else { return };
    let (Ok(from), Ok(to)) = (server.try_clone(), visitor.try_clone()) else { return };
    let answers = Arc::clone(state);
    std::thread::spawn(move || carry(from, to, &answers, |_| None));
    let requests = Arc::clone(state);
    carry(visitor, server, state, move |piece| {
        if !piece.starts_with(b"PUT ") {
            return None;
        }
        if requests.is(Door::Full) {
            return Some(b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        let line = piece.split(|byte| *byte == b'\r').next().unwrap_or_default();
        if String::from_utf8_lossy(line).contains("/chunks/") {
            requests.chunks.fetch_add(1, Ordering::Relaxed);
        }
        None
    });
}

/// Carries bytes until one side is gone, the door is shut or a piece is answered instead.
fn carry(mut from: TcpStream, mut to: TcpStream, state: &State, answer: impl Fn(&[u8]) -> Option<&'static [u8]>) {
    let mut piece = [0; PIECE];
    while let Ok(n @ 1..) = from.read(&mut piece) {
        if state.is(Door::Shut) {
            break;
        }
        if let Some(words) = answer(&piece[..n]) {
            let _ = from.write_all(words);
            // What is not read would make the kernel take the answer back.
            let _ = from.set_read_timeout(Some(Duration::from_millis(200)));
            while let Ok(1..) = from.read(&mut piece) {}
            break;
        }
        if state.is(Door::Slow) {
            std::thread::sleep(Duration::from_millis(100));
        }
        if to.write_all(&piece[..n]).is_err() {
            break;
        }
    }
    // The other direction ends with this one.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
