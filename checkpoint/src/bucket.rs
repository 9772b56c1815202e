//! A bucket of an object store that speaks S3's protocol, for threads that may wait.
//!
//! A request that fails is tried again a little here; whoever asked decides for how long more.

use crate::error::StoreError;
use crate::place::{Medium, NamedError};
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Objects that are written or removed at one time: so many are copied.
const AT_ONCE: usize = 8;
/// A request is given up after so long: a chunk over a slow line takes its time, and training does not wait.
const REQUEST: Duration = Duration::from_secs(300);
const CONNECT: Duration = Duration::from_secs(5);
/// The whole of what is tried again here.
const AGAIN: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Bucket {
    url: String,
    prefix: Path,
    store: AmazonS3,
    /// Only moves while somebody waits for it. Taken when the bucket goes.
    runtime: Option<Runtime>,
}

impl Bucket {
    /// Of `s3://BUCKET/PREFIX`, with the environment's region, endpoint and credentials.
    pub(crate) fn open(url: &str) -> Result<Self, StoreError> {
        let wrong = |reason: String| StoreError::Place { url: url.to_owned(), reason };
        let rest = url.strip_prefix("s3://").ok_or_else(|| wrong("expected s3://BUCKET/PREFIX".to_owned()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(wrong("it names no bucket".to_owned()));
        }
        let prefix = Path::parse(prefix.trim_end_matches('/')).map_err(|e| wrong(e.to_string()))?;
        // Another part of the process may have chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig { max_retries: 3, retry_timeout: AGAIN, ..RetryConfig::default() };
        // The environment may allow plain HTTP for an endpoint of one's own.
        let plain = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value == "true" || value == "1");
        let options = ClientOptions::new().with_timeout(REQUEST).with_connect_timeout(CONNECT).with_allow_http(plain);
        let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
        let store = builder.with_client_options(options).build().map_err(|e| wrong(e.to_string()))?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|e| wrong(e.to_string()))?;
        Ok(Self { url: url.trim_end_matches('/').to_owned(), prefix, store, runtime: Some(runtime) })
    }

    fn key(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Waits for requests, on a thread of its own: the caller's may belong to another runtime.
    fn wait<T: Send, E: Send>(&self, requests: impl Future<Output = Result<T, E>> + Send) -> Result<T, E> {
        let runtime = self.runtime.as_ref().expect("it is there until the bucket goes");
        let done = std::thread::scope(|scope| scope.spawn(|| runtime.block_on(requests)).join());
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// What is there with its length is taken for whole: such stores verify what they hold.
    async fn put_one(&self, name: &str, bytes: &[u8]) -> object_store::Result<()> {
        let key = self.key(name);
        let there = match self.store.head(&key).await {
            Ok(found) => found.size == bytes.len() as u64,
            Err(object_store::Error::NotFound { .. }) => false,
            Err(error) => return Err(error),
        };
        if there { Ok(()) } else { self.store.put(&key, bytes.to_vec().into()).await.map(|_| ()) }
    }
}

impl Medium for Bucket {
    fn path(&self, name: &str) -> PathBuf {
        std::path::Path::new(&self.url).join(name)
    }

    /// Objects need no folder.
    fn make(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let put = self.wait(self.store.put(&self.key(name), bytes.to_vec().into()));
        put.map(|_| ()).map_err(io::Error::from)
    }

    fn put_new(&self, all: &[(String, &[u8])]) -> Result<(), NamedError> {
        let put = async |(name, bytes): &(String, &[u8])| {
            self.put_one(name, bytes).await.map_err(|error| (name.clone(), io::Error::from(error)))
        };
        let puts = futures_util::stream::iter(all).map(put).buffer_unordered(AT_ONCE);
        self.wait(puts.try_collect::<Vec<()>>()).map(|_| ())
    }

    fn get(&self, name: &str) -> io::Result<Vec<u8>> {
        let key = self.key(name);
        let get = async { self.store.get(&key).await?.bytes().await };
        Ok(self.wait(get).map_err(io::Error::from)?.to_vec())
    }

    fn names(&self, folder: &str) -> io::Result<Vec<String>> {
        let within = self.key(folder);
        let all = self.wait(self.store.list(Some(&within)).try_collect::<Vec<_>>()).map_err(io::Error::from)?;
        let name = |found: object_store::ObjectMeta| found.location.filename().map(str::to_owned);
        Ok(all.into_iter().filter_map(name).collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.wait(self.store.delete(&self.key(name))).map_err(io::Error::from)
    }

    fn remove_all(&self, names: &mut (dyn Iterator<Item = String> + Send)) -> Result<(), NamedError> {
        let remove = async |name: String| {
            self.store.delete(&self.key(&name)).await.map_err(|error| (name, io::Error::from(error)))
        };
        let removals = futures_util::stream::iter(names).map(remove).buffer_unordered(AT_ONCE);
        self.wait(removals.try_collect::<Vec<()>>()).map(|_| ())
    }

    /// A copy, then the end of the old one: a crash between them leaves both.
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.wait(self.store.rename(&self.key(from), &self.key(to))).map_err(io::Error::from)
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // Waiting for its threads is not allowed where another runtime runs.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_bucket_is_named() {
        for (url, reason) in [("http://x/y", "expected s3://BUCKET/PREFIX"), ("s3:///y", "names no bucket")] {
            let error = Bucket::open(url).unwrap_err().to_string();
            assert!(error.contains(url) && error.contains(reason), "{error}");
        }
    }
}
