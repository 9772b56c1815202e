//! Values as disks and other supervisors have them: the version of their form, then bincode. What another version wrote is
//! named, not misread.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version and the value.
pub(crate) fn encode<T: Serialize + ?Sized>(version: u8, value: &T) -> Vec<u8> {
    let body = bincode::serde::encode_to_vec(value, bincode::config::standard()).expect("it can be encoded");
    [&[version][..], &body].concat()
}

/// A value of that version, of at most `MAX` bytes, and nothing after it.
pub(crate) fn decode<T: DeserializeOwned, const MAX: usize>(version: u8, bytes: &[u8]) -> Result<T, String> {
    let config = bincode::config::standard().with_limit::<MAX>();
    match bytes.split_first() {
        Some((first, body)) if *first == version => match bincode::serde::decode_from_slice(body, config) {
            Ok((value, read)) if read == body.len() => Ok(value),
            Ok((_, read)) => Err(format!("{} bytes follow its end", body.len() - read)),
            Err(error) => Err(format!("it cannot be decoded: {error}")),
        },
        Some(_) | None => Err(format!("another version of this program wrote it, this one reads version {version}")),
    }
}
