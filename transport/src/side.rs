//! What the two ends of a connection say beside their session: which way it takes.
//!
//! A message: kind (u8), length of the rest (u16), round (u32), the rest. All little-endian. The dialler counts rounds: what is
//! said of another than the present one comes too late.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// What both sides tell each other when a session is to go on: units received by lane, the random name of one's own half of the
/// session, and that of the other half as far as it is known (0: not yet).
pub(crate) type Greeting = [u64; 4];
/// Bytes of a greeting.
pub(crate) const GREETING: usize = 32;

/// As bytes.
pub(crate) fn greeting_bytes(greeting: Greeting) -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    for (place, word) in bytes.chunks_exact_mut(8).zip(greeting) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// From bytes.
pub(crate) fn greeting(bytes: &[u8; GREETING]) -> Greeting {
    std::array::from_fn(|w| u64::from_le_bytes(*bytes[8 * w..].first_chunk().expect("eight bytes")))
}

/// A secret of one use.
pub(crate) type Token = [u8; 32];

/// Bytes of a message's begin.
pub(crate) const HEAD: usize = 7;
/// Bytes of what follows.
pub(crate) const REST_MAX: usize = 512;
/// Addresses that are told at most.
pub(crate) const ADDRESSES_MAX: usize = 16;
const ADDRESS: usize = 18;
/// Bytes of a reason.
const WHY_MAX: usize = 256;

/// What is said of a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    /// The dialler can do RDMA: can the other?
    Offer,
    /// It can, and listens for who comes with the token.
    Listen(Token, Vec<SocketAddr>),
    /// It cannot.
    Decline(String),
    /// It has proven the path, and its session rests with this.
    Proven(Greeting),
    /// The dialler has, too: both go on over RDMA.
    Go(Greeting),
    /// The path is of no use (any more).
    Back(String),
}

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SaidError {
    #[error("a message about the way of kind {0}, expected 1 to 6")]
    Kind(u8),
    #[error("a message about the way claims {0} bytes, the limit is {REST_MAX}")]
    TooLong(usize),
    #[error("a message about the way of kind {kind} with {got} bytes")]
    Length { kind: u8, got: usize },
    #[error("a message about the way has a reason that is no text")]
    Text,
}

impl Said {
    fn kind(&self) -> u8 {
        match self {
            Self::Offer => 1,
            Self::Listen(..) => 2,
            Self::Decline(_) => 3,
            Self::Proven(_) => 4,
            Self::Go(_) => 5,
            Self::Back(_) => 6,
        }
    }

    /// As bytes. Of many addresses the first are told, of a long reason the begin.
    pub(crate) fn encode(&self, round: u32) -> Vec<u8> {
        let mut rest = Vec::new();
        match self {
            Self::Offer => {}
            Self::Listen(token, addresses) => {
                rest.extend(token);
                for address in addresses.iter().take(ADDRESSES_MAX) {
                    let v6 = match address.ip() {
                        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                        IpAddr::V6(v6) => v6,
                    };
                    rest.extend(v6.octets());
                    rest.extend(address.port().to_le_bytes());
                }
            }
            Self::Decline(why) | Self::Back(why) => {
                rest.extend(&why.as_bytes()[..why.floor_char_boundary(WHY_MAX)]);
            }
            Self::Proven(greeting) | Self::Go(greeting) => rest.extend(greeting_bytes(*greeting)),
        }
        let head = [&[self.kind()][..], &(rest.len() as u16).to_le_bytes(), &round.to_le_bytes()];
        [head.concat(), rest].concat()
    }

    /// Kind, length of the rest and round of a message's begin.
    pub(crate) fn head(bytes: &[u8; HEAD]) -> Result<(u8, usize, u32), SaidError> {
        let (kind, length) = (bytes[0], usize::from(u16::from_le_bytes([bytes[1], bytes[2]])));
        if !(1..=6).contains(&kind) {
            return Err(SaidError::Kind(kind));
        }
        if length > REST_MAX {
            return Err(SaidError::TooLong(length));
        }
        Ok((kind, length, u32::from_le_bytes([bytes[3], bytes[4], bytes[5], bytes[6]])))
    }

    /// What a message's kind and rest say.
    pub(crate) fn decode(kind: u8, rest: &[u8]) -> Result<Self, SaidError> {
        let wrong = || SaidError::Length { kind, got: rest.len() };
        let text = || String::from_utf8(rest.to_vec()).map_err(|_| SaidError::Text);
        let greeting = || rest.try_into().map(greeting).map_err(|_| wrong());
        match kind {
            1 if rest.is_empty() => Ok(Self::Offer),
            2 => {
                let (token, addresses) = rest.split_first_chunk::<32>().ok_or_else(wrong)?;
                if !addresses.len().is_multiple_of(ADDRESS) || addresses.len() > ADDRESSES_MAX * ADDRESS {
                    return Err(wrong());
                }
                Ok(Self::Listen(*token, addresses.chunks_exact(ADDRESS).map(address).collect()))
            }
            3 => Ok(Self::Decline(text()?)),
            4 => Ok(Self::Proven(greeting()?)),
            5 => Ok(Self::Go(greeting()?)),
            6 => Ok(Self::Back(text()?)),
            _ => Err(wrong()),
        }
    }
}

fn address(bytes: &[u8]) -> SocketAddr {
    let ip = Ipv6Addr::from(*bytes.first_chunk::<16>().expect("sixteen bytes"));
    SocketAddr::new(ip.to_canonical(), u16::from_le_bytes([bytes[16], bytes[17]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<(u32, Said), SaidError> {
        let (head, rest) = bytes.split_first_chunk::<HEAD>().expect("a whole begin");
        let (kind, length, round) = Said::head(head)?;
        assert_eq!(rest.len(), length);
        Ok((round, Said::decode(kind, rest)?))
    }

    #[test]
    fn what_is_said_is_read() {
        let addresses = ["10.0.0.1:7", "[fd00::1]:65535"].map(|a| a.parse().unwrap()).to_vec();
        let all = [
            Said::Offer,
            Said::Listen([7; 32], addresses),
            Said::Decline("no device".to_owned()),
            Said::Proven([1, 2, 3, u64::MAX]),
            Said::Go([0; 4]),
            Said::Back(String::new()),
        ];
        for (round, said) in (7..).zip(all) {
            assert_eq!(read(&said.encode(round)), Ok((round, said)));
        }
        let long = "é".repeat(WHY_MAX);
        let (_, Said::Back(told)) = read(&Said::Back(long.clone()).encode(0)).unwrap() else {
            panic!("something else")
        };
        assert!(long.starts_with(&told) && told.len() == WHY_MAX);
    }

    #[test]
    fn what_is_too_much_is_refused() {
        assert_eq!(Said::head(&[0; HEAD]), Err(SaidError::Kind(0)));
        assert_eq!(Said::head(&[1, 1, 2, 0, 0, 0, 0]), Err(SaidError::TooLong(513)));
        assert_eq!(Said::decode(1, &[0]), Err(SaidError::Length { kind: 1, got: 1 }));
        assert_eq!(Said::decode(2, &[0; 40]), Err(SaidError::Length { kind: 2, got: 40 }));
        assert_eq!(Said::decode(4, &[0; 31]), Err(SaidError::Length { kind: 4, got: 31 }));
        assert_eq!(Said::decode(6, &[0xFF]), Err(SaidError::Text));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(kind: u8, rest in prop::collection::vec(any::<u8>(), 0..REST_MAX)) {
            let _ = Said::decode(kind, &rest);
        }
    }
}
