//! Hugging Face folders of DeepSeek-V3 models: safetensors with an index, config.json, tokenizer.
//!
//! Names of parameters are the published ones already, so a folder is a list of tensors with types
//! (`inventory`), written by `export` and read by `import`.

mod config_json;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod inventory;
mod read;
