//! Reads tensors of a folder of safetensors, one at a time: nothing but the headers is kept.

use anyhow::{Context, Result, bail, ensure};
use everstep_kernels::{bf16_value, dequantise_blocks};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of a header; the format's own limit.
const HEADER_MAX: u64 = 100_000_000;

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes in the file.
    from: u64,
    bytes: usize,
}

/// The tensors of a folder by name.
#[derive(Debug)]
pub(crate) struct Folder {
    files: Vec<(PathBuf, File)>,
    places: BTreeMap<String, Place>,
}

impl Folder {
    /// Reads the headers of `NAME.safetensors`, or of the files that `NAME.safetensors.index.json` lists,
    /// for each of `names`; the first must be there.
    pub(crate) fn open(folder: &Path, names: &[&str]) -> Result<Self> {
        let mut all = Self { files: Vec::new(), places: BTreeMap::new() };
        for (n, name) in names.iter().enumerate() {
            let index = folder.join(format!("{name}.safetensors.index.json"));
            let single = folder.join(format!("{name}.safetensors"));
            if index.exists() {
                all.add_index(folder, &index)?;
            } else if single.exists() {
                all.add_file(&single)?;
            } else if n == 0 {
                bail!("{} has neither {name}.safetensors nor {name}.safetensors.index.json", folder.display());
            }
        }
        Ok(all)
    }

    fn add_index(&mut self, folder: &Path, path: &Path) -> Result<()> {
        let index: serde_json::Value = crate::data::read_json(path)?;
        let map = index["weight_map"].as_object();
        let map = map.with_context(|| format!("{} has no weight_map", path.display()))?;
        let mut files: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
        for (tensor, file) in map {
            let file = file.as_str().filter(|f| !f.contains('/') && !f.is_empty());
            let file = file.with_context(|| format!("{}: weight_map.{tensor} is no file name", path.display()))?;
            files.entry(file).or_default().push(tensor);
        }
        for (file, tensors) in files {
            let file = folder.join(file);
            self.add_file(&file).with_context(|| format!("listed in {}", path.display()))?;
            for tensor in tensors {
                let found = self.places.get(tensor).is_some_and(|p| self.files[p.file].0 == file);
                ensure!(found, "{}: {tensor} is not there, but {} says so", file.display(), path.display());
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let at = || path.display();
        let file = File::open(path).with_context(|| format!("cannot read {}", at()))?;
        let length = file.metadata().with_context(|| format!("cannot read {}", at()))?.len();
        let mut size = [0u8; 8];
        file.read_exact_at(&mut size, 0).with_context(|| format!("{} is no safetensors file: too short", at()))?;
        let header = u64::from_le_bytes(size);
        ensure!(header <= HEADER_MAX && header + 8 <= length, "{}: a header of {header} bytes cannot be", at());
        let mut buffer = vec![0; header as usize];
        file.read_exact_at(&mut buffer, 8).with_context(|| format!("cannot read {}", at()))?;
        // Its own rules (no gaps, no overlaps, lengths that fit) are checked as it is read.
        let metadata: Metadata = serde_json::from_slice(&buffer).with_context(|| format!("{}: its header", at()))?;
        let begin = header + 8;
        let end = begin + metadata.data_len() as u64;
        ensure!(length >= end, "{} is truncated: it has {length} bytes, its header names {end}", at());
        for (name, info) in metadata.tensors() {
            let (from, to) = info.data_offsets;
            let place = Place {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                from: begin + from as u64,
                bytes: to - from,
            };
            if let Some(other) = self.places.insert(name.clone(), place) {
                bail!("{}: {name} is in {} too", at(), self.files[other.file].0.display());
            }
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }

    /// Names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Why a tensor cannot be read as `rows x columns`, if it cannot; nothing is read.
    pub(crate) fn check(&self, name: &str, rows: usize, columns: usize) -> Result<()> {
        let place = self.place(name)?;
        let path = self.files[place.file].0.display();
        let vector = rows == 1 && place.shape == [columns];
        ensure!(
            vector || place.shape == [rows, columns],
            "{path}: {name} has shape {:?}, expected {rows} x {columns}",
            place.shape
        );
        match place.dtype {
            Dtype::F32 | Dtype::BF16 => Ok(()),
            Dtype::F8_E4M3 => {
                let scales = format!("{name}_scale_inv");
                let of = self.place(&scales)?;
                let blocks = [rows.div_ceil(super::inventory::BLOCK), columns.div_ceil(super::inventory::BLOCK)];
                ensure!(of.dtype == Dtype::F32, "{path}: {scales} has type {:?}, expected F32", of.dtype);
                ensure!(of.shape == blocks, "{path}: {scales} has shape {:?}, expected {blocks:?}", of.shape);
                Ok(())
            }
            other => bail!("{path}: {name} has type {other:?}: expected F32, BF16 or F8_E4M3"),
        }
    }

    /// Reads a tensor of `rows x columns` in f32.
    pub(crate) fn read(&self, name: &str, rows: usize, columns: usize) -> Result<Vec<f32>> {
        self.check(name, rows, columns)?;
        let place = self.place(name)?;
        let bytes = self.bytes(name, place)?;
        let words = |b: &[u8]| b.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        Ok(match place.dtype {
            Dtype::BF16 => bytes.chunks_exact(2).map(|c| bf16_value(u16::from_le_bytes([c[0], c[1]]))).collect(),
            Dtype::F8_E4M3 => {
                let scales = format!("{name}_scale_inv");
                let scales: Vec<f32> = words(&self.bytes(&scales, self.place(&scales)?)?);
                dequantise_blocks(&bytes, &scales, columns)
            }
            _ => words(&bytes),
        })
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).with_context(|| format!("tensor {name} is missing"))
    }

    fn bytes(&self, name: &str, place: &Place) -> Result<Vec<u8>> {
        let (path, file) = &self.files[place.file];
        let mut bytes = vec![0; place.bytes];
        file.read_exact_at(&mut bytes, place.from)
            .with_context(|| format!("{}: {name} cannot be read", path.display()))?;
        Ok(bytes)
    }
}
