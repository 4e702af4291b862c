//! Who may ask: keys, of which only hashes are kept.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use axum::http::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN};
use axum::http::{HeaderMap, HeaderValue};

use crate::error::ApiError;

/// Where Anthropic's clients put the key.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Characters of the shortest key.
const KEY_LENGTH_MIN: usize = 16;

/// A file of keys that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// A key is too short to be a secret.
    #[error("line {line} of {} has a key of {length} characters; a key has at least {KEY_LENGTH_MIN}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Characters of the key.
        length: usize,
    },
    /// There is none.
    #[error("{} has no key", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// The keys of those who may ask; none of them lets everybody.
#[derive(Clone, Debug, Default)]
pub struct ApiKeys {
    hashes: Vec<blake3::Hash>,
}

impl ApiKeys {
    /// Reads keys, one a line; blank lines and lines that begin with `#` are none. `path` is used in errors.
    ///
    /// # Errors
    ///
    /// [`KeysError`] names the line of a key that is too short, or a file without keys.
    pub fn parse(text: &str, path: &Path) -> Result<Self, KeysError> {
        let mut hashes = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let key = line.trim();
            if key.is_empty() || key.starts_with('#') {
                continue;
            }
            if key.len() < KEY_LENGTH_MIN {
                let (path, line, length) = (path.to_owned(), index + 1, key.len());
                return Err(KeysError::Short { path, line, length });
            }
            hashes.push(blake3::hash(key.as_bytes()));
        }
        if hashes.is_empty() {
            return Err(KeysError::Empty { path: path.to_owned() });
        }
        Ok(Self { hashes })
    }

    /// Whether keys are asked for.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Lets a request with a valid key through. The time this takes says nothing about any key: hashes
    /// are compared, in constant time, and all of them.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.is_empty() {
            return Ok(());
        }
        let hash = key_hash(headers);
        // `Hash` compares in constant time.
        let is_known = self.hashes.iter().fold(false, |known, key| known | (*key == hash));
        if is_known { Ok(()) } else { Err(ApiError::unauthorized()) }
    }

    /// Whose key a request that was let through has; nobody's where none is asked for.
    pub(crate) fn holder(&self, headers: &HeaderMap) -> Option<blake3::Hash> {
        (!self.is_empty()).then(|| key_hash(headers))
    }

    /// Where no key is asked for, lets a request through that was sent on this machine, to this machine: a page
    /// of another site that a browser here shows must not speak with the model.
    pub(crate) fn check_place(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if !self.is_empty() {
            return Ok(());
        }
        for name in [HOST, ORIGIN] {
            let Some(value) = headers.get(&name) else { continue };
            let value = value.to_str().unwrap_or_default();
            if !is_here(value.rsplit("://").next().unwrap_or_default()) {
                return Err(ApiError::foreign(&format!("{name} '{value}'")));
            }
        }
        Ok(())
    }
}

/// The hash of the key that a request has.
fn key_hash(headers: &HeaderMap) -> blake3::Hash {
    let header = |name| headers.get(name).map(HeaderValue::as_bytes);
    let bearer = header(AUTHORIZATION).and_then(|value| value.strip_prefix(b"Bearer "));
    blake3::hash(bearer.or_else(|| header(X_API_KEY)).unwrap_or_default())
}

/// Whether a host, with its port or without, is this machine by name or address.
fn is_here(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_keys_pass() {
        let text = "# ours\nsixteen-letters-1\n\n  sixteen-letters-2  \n";
        let keys = ApiKeys::parse(text, Path::new("keys")).unwrap();
        let check = |header: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(header) = header {
                headers.insert(AUTHORIZATION, header.parse().unwrap());
            }
            keys.check(&headers).is_ok()
        };
        assert!(check(Some("Bearer sixteen-letters-1")) && check(Some("Bearer sixteen-letters-2")));
        for header in
            [None, Some(""), Some("Bearer "), Some("sixteen-letters-1"), Some("Bearer # ours")]
        {
            assert!(!check(header), "{header:?}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(X_API_KEY, "sixteen-letters-2".parse().unwrap());
        assert!(keys.check(&headers).is_ok());
        assert!(ApiKeys::default().check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn pages_of_other_sites_do_not_pass() {
        let check = |host: &str, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(ORIGIN, origin.parse().unwrap());
            }
            ApiKeys::default().check_place(&headers).is_ok()
        };
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"] {
            assert!(check(host, None) && check(host, Some("http://localhost:3000")), "{host}");
            assert!(!check(host, Some("http://evil.example")), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "[::2]", ""] {
            assert!(!check(host, None), "{host}");
        }
        assert!(!check("localhost", Some("null")));
    }

    #[test]
    fn files_without_secrets_are_refused() {
        let parse = |text| ApiKeys::parse(text, Path::new("keys")).unwrap_err().to_string();
        assert_eq!(parse("# none\n"), "keys has no key");
        assert!(parse("\nshort\n").starts_with("line 2 of keys has a key of 5 characters"));
    }
}
