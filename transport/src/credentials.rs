//! The job's certificate authority and what a process proves its membership with.
//!
//! The authority is made when the job starts and its key is never stored: it signs one certificate,
//! which every process of the job has, and is gone.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use ring::rand::SecureRandom;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The name in the certificate: processes of a job, not machines.
pub(crate) const NAME: &str = "node.everstep";

const AUTHORITY: &str = "ca.pem";
const CERTIFICATE: &str = "node.pem";
const KEY: &str = "node.key";

/// What a process needs to be one of the job.
#[derive(Debug)]
pub struct Credentials {
    pub(crate) authority: CertificateDer<'static>,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
}

/// Credentials could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} holds no valid PEM: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// They could not be made.
    #[error("cannot make the job's certificates: {0}")]
    Make(#[from] rcgen::Error),
}

impl Credentials {
    /// Makes a new authority and the job's certificate, and writes them into `folder`.
    pub fn create(folder: &Path) -> Result<(), CredentialsError> {
        issue(&[(folder, CertificateParams::new(vec![NAME.to_owned()])?)])
    }

    /// Reads what [`Self::create`] wrote.
    pub fn load(folder: &Path) -> Result<Self, CredentialsError> {
        fn read<T: PemObject>(folder: &Path, name: &str) -> Result<T, CredentialsError> {
            let path = folder.join(name);
            let bytes = fs::read(&path).map_err(|source| CredentialsError::File { path: path.clone(), source })?;
            T::from_pem_slice(&bytes).map_err(|e| CredentialsError::Invalid { path, reason: e.to_string() })
        }
        Ok(Self {
            authority: read(folder, AUTHORITY)?,
            certificate: read(folder, CERTIFICATE)?,
            key: read(folder, KEY)?,
        })
    }
}

/// Certificates of one new authority, each written with it into a folder.
fn issue(all: &[(&Path, CertificateParams)]) -> Result<(), CredentialsError> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let key = KeyPair::generate()?;
    let authority = params.self_signed(&key)?;
    let issuer = Issuer::new(params, key);
    for (folder, params) in all {
        let node_key = KeyPair::generate()?;
        let node = params.clone().signed_by(&node_key, &issuer)?;
        let file = |path: &Path, source| CredentialsError::File { path: path.to_owned(), source };
        fs::create_dir_all(folder).map_err(|e| file(folder, e))?;
        for (name, text) in [(AUTHORITY, authority.pem()), (CERTIFICATE, node.pem()), (KEY, node_key.serialize_pem())] {
            let path = folder.join(name);
            write_private(&path, text.as_bytes()).map_err(|e| file(&path, e))?;
        }
    }
    Ok(())
}

/// The job's, and others of the same authority that have expired.
#[cfg(test)]
pub(crate) fn with_expired(folder: &Path, expired: &Path) {
    let params = || CertificateParams::new(vec![NAME.to_owned()]).expect("a valid name");
    let mut old = params();
    (old.not_before, old.not_after) = (rcgen::date_time_ymd(2000, 1, 1), rcgen::date_time_ymd(2001, 1, 1));
    issue(&[(folder, params()), (expired, old)]).expect("a folder to write into");
}

/// Bytes that nobody can guess.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new().fill(&mut bytes).expect("the system has random numbers");
    bytes
}

/// Writes a file that only its owner can read.
fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(bytes)
}
