//! Documents of a file, in pieces: text, JSONL, Parquet; plain or packed with gzip or zstd.
//!
//! Nothing is held but the piece that is read. A document longer than [`PIECE`] is cut after a line; the
//! cut depends on the text alone.

use anyhow::{Context, Result, bail, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Bytes after which a piece ends with its line.
const PIECE: usize = 1 << 20;
/// Bytes of a line: more is no text but a mistake.
const LINE_MAX: usize = 64 << 20;

/// How a file is read, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// One document.
    Text,
    /// One document, packed.
    Packed,
    /// A JSON object on each line, perhaps packed.
    Lines,
    /// A column of documents.
    Parquet,
    /// Tokens (`.bin`) with an index (`.idx`) beside them.
    Megatron,
}

impl Format {
    pub(super) fn of(path: &Path) -> Self {
        let name = path.to_string_lossy().to_lowercase();
        let inner = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst"));
        let base = inner.unwrap_or(&name);
        if base.ends_with(".jsonl") || base.ends_with(".ndjson") {
            Self::Lines
        } else if base.ends_with(".txt") && inner.is_some() {
            Self::Packed
        } else if name.ends_with(".parquet") {
            Self::Parquet
        } else if name.ends_with(".bin") && path.with_extension("idx").exists() {
            Self::Megatron
        } else {
            Self::Text
        }
    }
}

/// A document, or a part of one that ends with a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) text: Vec<u8>,
    /// Where it begins: a line, or a row of a column, from 1 on.
    pub(super) line: u64,
    /// Whether the document ends with it.
    pub(super) ends: bool,
}

/// Gives the pieces of a file in order; `read` is told how many bytes of the file have been read so far.
pub(super) fn each(
    path: &Path,
    field: &str,
    bar: &indicatif::ProgressBar,
    take: &mut dyn FnMut(Piece) -> Result<()>,
) -> Result<()> {
    let at = || path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot read {}", at()))?;
    match Format::of(path) {
        Format::Parquet => parquet(file, field, take).with_context(at),
        Format::Lines => lines(&mut unpacked(path, bar.wrap_read(file))?, field, take).with_context(at),
        Format::Text | Format::Packed => text(&mut unpacked(path, bar.wrap_read(file))?, take).with_context(at),
        Format::Megatron => unreachable!("files of tokens have no text"),
    }
}

fn unpacked(path: &Path, file: impl Read + Send + 'static) -> Result<Box<dyn BufRead + Send>> {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    Ok(match extension.as_deref() {
        Some("gz") => Box::new(BufReader::with_capacity(PIECE, flate2::read::MultiGzDecoder::new(file))),
        Some("zst") => Box::new(BufReader::with_capacity(PIECE, zstd::Decoder::new(file)?)),
        _ => Box::new(BufReader::with_capacity(PIECE, file)),
    })
}

/// The next line with its end, if there is one.
fn line(from: &mut dyn BufRead, number: u64) -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    from.take(LINE_MAX as u64 + 1).read_until(b'\n', &mut line).with_context(|| format!("line {number}"))?;
    ensure!(line.len() <= LINE_MAX, "line {number} has more than {LINE_MAX} bytes");
    Ok(Some(line).filter(|l| !l.is_empty()))
}

fn text(from: &mut dyn BufRead, take: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
    let (mut piece, mut begin, mut number) = (Vec::new(), 1, 0);
    while let Some(line) = line(from, number + 1)? {
        number += 1;
        piece.extend(line);
        if piece.len() >= PIECE {
            take(Piece { text: std::mem::take(&mut piece), line: begin, ends: false })?;
            begin = number + 1;
        }
    }
    take(Piece { text: piece, line: begin, ends: true })
}

fn lines(from: &mut dyn BufRead, field: &str, take: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
    let mut number = 0;
    while let Some(line) = line(from, number + 1)? {
        number += 1;
        ensure!(!line.trim_ascii().is_empty(), "line {number} is empty: expected a JSON object");
        let value: serde_json::Value =
            serde_json::from_slice(&line).with_context(|| format!("line {number} is not JSON"))?;
        let text = value.get(field).with_context(|| format!("line {number} has no key {field:?}"))?;
        let text = text.as_str().with_context(|| format!("line {number}: {field:?} is not a string"))?;
        take(Piece { text: text.as_bytes().to_vec(), line: number, ends: true })?;
    }
    Ok(())
}

fn parquet(file: File, field: &str, take: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
    let reader = SerializedFileReader::new(file).context("it is not a Parquet file")?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let names: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
    ensure!(names.iter().any(|n| n == field), "it has no column {field:?}, only {names:?}");
    let column = schema.root_schema().get_fields().iter().find(|f| f.name() == field);
    let column = column.with_context(|| format!("{field:?} is not a column of its own"))?;
    let projection = parquet::schema::types::Type::group_type_builder(schema.root_schema().name())
        .with_fields(vec![std::sync::Arc::clone(column)])
        .build()?;
    for (n, row) in reader.get_row_iter(Some(projection))?.enumerate() {
        let number = n as u64 + 1;
        let row = row.with_context(|| format!("row {number}"))?;
        let text = match row.get_column_iter().next() {
            Some((_, Field::Str(text))) => text.as_bytes().to_vec(),
            Some((_, Field::Bytes(bytes))) => bytes.data().to_vec(),
            other => bail!("row {number}: column {field:?} holds {other:?}, expected a string"),
        };
        take(Piece { text, line: number, ends: true })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A way to read documents.
    type Reading = fn(&mut dyn BufRead, &mut dyn FnMut(Piece) -> Result<()>) -> Result<()>;

    fn pieces(mut bytes: &[u8], read: Reading) -> Result<Vec<Piece>> {
        let mut all = Vec::new();
        read(&mut bytes, &mut |piece| {
            all.push(piece);
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn long_texts_are_cut_after_lines_and_nothing_is_lost() {
        let long: Vec<u8> = (0..300_000).flat_map(|i| format!("line {i}\n").into_bytes()).collect();
        let all = pieces(&long, text).unwrap();
        assert!(all.len() > 2 && all.iter().all(|p| p.text.ends_with(b"\n") && p.text.len() <= PIECE + 20));
        assert_eq!(all.iter().flat_map(|p| p.text.clone()).collect::<Vec<_>>(), long);
        assert_eq!(all.iter().filter(|p| p.ends).count(), 1);
        let second = &all[1];
        assert!(second.text.starts_with(format!("line {}\n", second.line - 1).as_bytes()));
    }

    #[test]
    fn bad_lines_are_named() {
        let read = |text: &str| {
            let f = |from: &mut dyn BufRead, take: &mut dyn FnMut(Piece) -> Result<()>| lines(from, "text", take);
            pieces(text.as_bytes(), f)
        };
        assert_eq!(read("{\"text\": \"a\\u00e9\"}\n{\"text\":\"\"}").unwrap().len(), 2);
        for (bad, words) in [
            ("{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n", "line 2 is empty"),
            ("{\"text\": \"a\"}\n{\"text\"\n", "line 2 is not JSON"),
            ("{\"body\": \"a\"}\n", "line 1 has no key \"text\""),
            ("{\"text\": 7}\n", "line 1: \"text\" is not a string"),
        ] {
            let error = format!("{:#}", read(bad).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    /// Every format gives the same documents.
    #[test]
    fn packed_files_and_columns_are_read() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let texts = ["one\ntwo", "", "three ü"];
        let json: String = texts.iter().map(|t| serde_json::json!({ "text": t, "id": 7 }).to_string() + "\n").collect();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a.jsonl"), &json).unwrap();
        let mut gz = flate2::write::GzEncoder::new(File::create(at("a.jsonl.gz")).unwrap(), Default::default());
        gz.write_all(json.as_bytes()).unwrap();
        gz.finish().unwrap();
        std::fs::write(at("a.jsonl.zst"), zstd::encode_all(json.as_bytes(), 1).unwrap()).unwrap();
        let schema = "message m { required binary text (UTF8); required int32 id; }";
        let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let file = File::create(at("a.parquet")).unwrap();
        let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<parquet::data_type::ByteArray> = texts.iter().map(|t| (*t).into()).collect();
        column.typed::<parquet::data_type::ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<parquet::data_type::Int32Type>().write_batch(&[7, 7, 7], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let bar = indicatif::ProgressBar::hidden();
        for name in ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"] {
            let mut found = Vec::new();
            each(&at(name), "text", &bar, &mut |piece| {
                found.push(String::from_utf8(piece.text).unwrap());
                Ok(())
            })
            .unwrap();
            assert_eq!(found, texts, "{name}");
        }
        let error = each(&at("a.parquet"), "body", &bar, &mut |_| Ok(())).unwrap_err();
        assert!(format!("{error:#}").contains("no column \"body\", only [\"text\", \"id\"]"), "{error:#}");
        let error = each(&at("a.parquet"), "id", &bar, &mut |_| Ok(())).unwrap_err();
        assert!(format!("{error:#}").contains("row 1: column \"id\" holds"), "{error:#}");
    }

    #[test]
    fn an_endless_line_is_refused_without_reading_it_all() {
        let mut endless = BufReader::new(std::io::repeat(b'x'));
        let error = text(&mut endless, &mut |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), format!("line 1 has more than {LINE_MAX} bytes"));
    }
}
