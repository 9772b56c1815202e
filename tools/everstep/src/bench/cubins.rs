//! Machine code of kernels, kept between processes in the user's cache.

use everstep_kernels::Cubins;
use std::path::PathBuf;

/// A folder with a file for each key; nothing is kept where the user has no cache.
#[derive(Debug)]
pub(crate) struct Folder(Option<PathBuf>);

impl Folder {
    /// `$XDG_CACHE_HOME/everstep/kernels`, or `.cache` of the home folder.
    pub(crate) fn find() -> Self {
        let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = of("XDG_CACHE_HOME").or_else(|| Some(of("HOME")?.join(".cache")));
        Self(cache.map(|cache| cache.join("everstep/kernels")))
    }
}

impl Cubins for Folder {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        std::fs::read(self.0.as_ref()?.join(key)).ok()
    }

    /// A cache that cannot be written costs the next process some seconds, and nothing else.
    fn put(&self, key: &str, cubin: &[u8]) {
        let Some(folder) = &self.0 else { return };
        let scratch = folder.join(format!("{key}.{}", std::process::id()));
        let kept = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&scratch, cubin))
            .and_then(|()| std::fs::rename(&scratch, folder.join(key)));
        if let Err(error) = kept {
            tracing::warn!("{}: {error}; kernels are compiled again next time", folder.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let cubins = Folder(Some(folder.path().join("not/there/yet")));
        assert_eq!(cubins.get("a"), None);
        cubins.put("a", &[1, 2, 3]);
        assert_eq!(cubins.get("a"), Some(vec![1, 2, 3]));
        let nowhere = Folder(None);
        nowhere.put("a", &[1]);
        assert_eq!(nowhere.get("a"), None);
    }
}
