//! What comes from outside, for a fuzzer: any bytes must be taken or refused, without a panic and within bounds.

use crate::codec::FrameReader;
use crate::message::FRAGMENT_MAX;
use crate::session::Frame;
use crate::side::{HEAD, Said};
use bytes::Bytes;

/// A stream of frames in pieces as long as the first byte says.
pub fn frames(bytes: &[u8]) {
    let Some((cut, bytes)) = bytes.split_first() else { return };
    let mut reader = FrameReader::default();
    for piece in bytes.chunks(usize::from(*cut) + 1) {
        let mut piece = Bytes::copy_from_slice(piece);
        loop {
            match reader.next(&mut piece) {
                Ok(Some(Frame::Data { unit, .. })) => assert!(unit.len() <= FRAGMENT_MAX),
                Ok(Some(Frame::Grant { .. })) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(piece.is_empty());
    }
}

/// One message about the way.
pub fn way(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else { return };
    if let Ok((kind, _, round)) = Said::head(head)
        && let Ok(said) = Said::decode(kind, rest)
    {
        let again = said.encode(round);
        let (head, rest) = again.split_first_chunk::<HEAD>().expect("a whole begin");
        let (kind, length, same) = Said::head(head).expect("it was written here");
        assert_eq!((length, same), (rest.len(), round));
        let read = Said::decode(kind, rest).expect("it was written here");
        // A long reason loses its end.
        assert!(read == said || matches!(said, Said::Decline(_) | Said::Back(_)));
    }
}

/// Packets and words of a peer, on a link whose path is proven or not.
pub fn rdma(bytes: &[u8]) {
    crate::rdma::fuzz(bytes);
}
