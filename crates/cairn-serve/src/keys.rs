//! Who may ask what: keys, of which only hashes are kept, with what each may do and how many tokens a minute.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN};
use axum::http::{HeaderMap, HeaderValue};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use ring::digest::{SHA256, digest};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

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
    #[error("{name} of {} has a key of {length} characters; a key has at least {KEY_LENGTH_MIN}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// The line, or what the key is called.
        name: String,
        /// Characters of the key.
        length: usize,
    },
    /// There is none.
    #[error("{} has no key", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// It does not say what keys are.
    #[error("{} is no file of keys: line {line}: {what}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// The line that is wrong, from 1.
        line: usize,
        /// What is wrong with it, without its text, which may be a secret.
        what: String,
    },
    /// An entry is none.
    #[error("key '{name}' of {} {what}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// What the key is called.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Scope {
    /// Answers.
    Generate,
    /// Vectors of texts.
    Embed,
    /// What was done, for Prometheus.
    Metrics,
    /// Loading models and forgetting them.
    Admin,
}

impl Scope {
    /// What the file of keys calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Embed => "embed",
            Self::Metrics => "metrics",
            Self::Admin => "admin",
        }
    }
}

/// What a request has to have to be let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Nothing.
    Nothing,
    /// A key, whatever it is for.
    Key,
    /// A key for this.
    Scope(Scope),
}

/// A key.
#[derive(Debug)]
struct Key {
    name: String,
    /// The SHA-256 of its text. The type compares in constant time.
    hash: blake3::Hash,
    scopes: Vec<Scope>,
    tokens: Option<Tokens>,
}

/// Tokens that may be asked for.
#[derive(Debug)]
struct Tokens {
    per_minute: NonZeroU32,
    limiter: DefaultDirectRateLimiter,
}

/// Who asks: the key of a request that was let through, if one was asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holder(Option<Arc<Key>>);

impl Holder {
    /// What tells holders apart; nothing where no key is asked for.
    pub(crate) fn mark(&self) -> Option<&[u8; 32]> {
        self.0.as_ref().map(|key| key.hash.as_bytes())
    }

    /// What the key is called.
    pub(crate) fn name(&self) -> Option<&str> {
        self.0.as_ref().map(|key| key.name.as_str())
    }

    /// Counts tokens, those of prompts and as many as answers may have: all of them, or none and the request is
    /// told when to come back.
    pub(crate) fn spend(&self, tokens: usize) -> Result<(), ApiError> {
        let Some(Tokens { per_minute, limiter }) =
            self.0.as_ref().and_then(|key| key.tokens.as_ref())
        else {
            return Ok(());
        };
        let never = || ApiError::too_many_tokens(tokens, per_minute.get());
        let asked = u32::try_from(tokens).ok().ok_or_else(never)?;
        let Some(asked) = NonZeroU32::new(asked) else { return Ok(()) };
        match limiter.check_n(asked) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(not_yet)) => {
                let wait = not_yet.wait_time_from(DefaultClock::default().now());
                Err(ApiError::rate(tokens, per_minute.get(), wait))
            }
            Err(_) => Err(never()),
        }
    }
}

/// The keys of those who may ask; none of them lets everybody.
#[derive(Clone, Debug, Default)]
pub struct ApiKeys {
    keys: Arc<[Arc<Key>]>,
}

/// A file of keys in TOML.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    #[serde(default)]
    key: Vec<KeyEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    name: String,
    key: Option<Secret>,
    sha256: Option<String>,
    scopes: Vec<Scope>,
    tokens_per_minute: Option<NonZeroU32>,
}

/// A key's text, which no error repeats.
struct Secret(String);

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(text) => Ok(Self(text)),
            _ => Err(D::Error::custom("key is no text: it stands between quotes")),
        }
    }
}

impl ApiKeys {
    /// Reads keys, one a line; blank lines and lines that begin with `#` are none. They are for all but
    /// [`Scope::Admin`]. `path` is used in errors.
    ///
    /// # Errors
    ///
    /// [`KeysError`] names the line of a key that is too short, or a file without keys.
    pub fn parse(text: &str, path: &Path) -> Result<Self, KeysError> {
        let lines = text.lines().map(str::trim).enumerate();
        let lines = lines.filter(|(_, key)| !key.is_empty() && !key.starts_with('#'));
        let key = |(index, key): (usize, &str)| {
            let name = format!("line {}", index + 1);
            let hash = hash_of(key, &name, path)?;
            let scopes = vec![Scope::Generate, Scope::Embed, Scope::Metrics];
            Ok(Key { name, hash, scopes, tokens: None })
        };
        Self::of(lines.map(key).collect::<Result<_, _>>()?, path)
    }

    /// Reads keys in TOML: `[[key]]` with `name`, `key` or its `sha256`, `scopes`, and `tokens_per_minute` where
    /// there is a limit. `path` is used in errors.
    ///
    /// # Errors
    ///
    /// [`KeysError`] says what is no TOML of this form, or names the key that is none.
    pub fn parse_toml(text: &str, path: &Path) -> Result<Self, KeysError> {
        let file: KeysFile = toml::from_str(text).map_err(|error| {
            // The error itself would print the line.
            let before = error.span().and_then(|span| text.get(..span.start));
            let line = 1 + before.unwrap_or_default().matches('\n').count();
            KeysError::Toml { path: path.to_owned(), line, what: error.message().to_owned() }
        })?;
        let key = |entry: KeyEntry| {
            let KeyEntry { name, key, sha256, scopes, tokens_per_minute } = entry;
            let wrong = |what| KeysError::Entry { path: path.to_owned(), name: name.clone(), what };
            let hash = match (key, sha256) {
                (Some(Secret(key)), None) => hash_of(&key, &name, path)?,
                (None, Some(hex)) => blake3::Hash::from_hex(hex.trim())
                    .map_err(|_| wrong("has a sha256 that is not of 64 hexadecimal digits"))?,
                _ => return Err(wrong("has neither key nor sha256, or both")),
            };
            if scopes.is_empty() {
                return Err(wrong("is for nothing: its scopes are empty"));
            }
            let tokens = tokens_per_minute.map(|per_minute| {
                let limiter = RateLimiter::direct(Quota::per_minute(per_minute));
                Tokens { per_minute, limiter }
            });
            Ok(Key { name, hash, scopes, tokens })
        };
        Self::of(file.key.into_iter().map(key).collect::<Result<_, _>>()?, path)
    }

    fn of(keys: Vec<Key>, path: &Path) -> Result<Self, KeysError> {
        if keys.is_empty() {
            return Err(KeysError::Empty { path: path.to_owned() });
        }
        for (index, key) in keys.iter().enumerate() {
            let is_other = |other: &Key| other.name == key.name || other.hash == key.hash;
            if keys[..index].iter().any(is_other) {
                let (path, name) = (path.to_owned(), key.name.clone());
                return Err(KeysError::Entry { path, name, what: "is there twice" });
            }
        }
        Ok(Self { keys: keys.into_iter().map(Arc::new).collect() })
    }

    /// Whether keys are asked for.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Lets a request with a key for what it wants through. The time this takes says nothing about any key: hashes
    /// are compared, in constant time, and all of them.
    pub(crate) fn check(&self, headers: &HeaderMap, needs: Needs) -> Result<Holder, ApiError> {
        if needs == Needs::Nothing {
            return Ok(Holder::default());
        }
        if self.is_empty() {
            return check_place(headers).map(|()| Holder::default());
        }
        let hash = key_hash(headers);
        let known = |found: Option<_>, key| if hash == Key::hash(key) { Some(key) } else { found };
        let key = self.keys.iter().fold(None, known).ok_or_else(ApiError::unauthorized)?;
        match needs {
            Needs::Scope(scope) if !key.scopes.contains(&scope) => {
                Err(ApiError::beyond_scope(scope.name()))
            }
            _ => Ok(Holder(Some(Arc::clone(key)))),
        }
    }
}

impl Key {
    fn hash(key: &Arc<Self>) -> blake3::Hash {
        key.hash
    }
}

/// Where no key is asked for, lets a request through that was sent on this machine, to this machine: a page
/// of another site that a browser here shows must not speak with the model.
fn check_place(headers: &HeaderMap) -> Result<(), ApiError> {
    for name in [HOST, ORIGIN] {
        let Some(value) = headers.get(&name) else { continue };
        let value = value.to_str().unwrap_or_default();
        if !is_here(value.rsplit("://").next().unwrap_or_default()) {
            return Err(ApiError::foreign(&format!("{name} '{value}'")));
        }
    }
    Ok(())
}

/// The hash of a key that is long enough.
fn hash_of(key: &str, name: &str, path: &Path) -> Result<blake3::Hash, KeysError> {
    if key.len() < KEY_LENGTH_MIN {
        let (path, name, length) = (path.to_owned(), name.to_owned(), key.len());
        return Err(KeysError::Short { path, name, length });
    }
    Ok(sha256(key.as_bytes()))
}

/// A SHA-256 in a type that is compared in constant time.
fn sha256(bytes: &[u8]) -> blake3::Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash.into()
}

/// The hash of the key that a request has.
fn key_hash(headers: &HeaderMap) -> blake3::Hash {
    let header = |name| headers.get(name).map(HeaderValue::as_bytes);
    let bearer = header(AUTHORIZATION).and_then(|value| value.strip_prefix(b"Bearer "));
    sha256(bearer.or_else(|| header(X_API_KEY)).unwrap_or_default())
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

    fn with(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn only_known_keys_pass() {
        let text = "# ours\nsixteen-letters-1\n\n  sixteen-letters-2  \n";
        let keys = ApiKeys::parse(text, Path::new("keys")).unwrap();
        let check = |header: Option<&str>| {
            let headers = header.map(|header| with(AUTHORIZATION, header)).unwrap_or_default();
            keys.check(&headers, Needs::Key).is_ok()
        };
        assert!(check(Some("Bearer sixteen-letters-1")) && check(Some("Bearer sixteen-letters-2")));
        for header in
            [None, Some(""), Some("Bearer "), Some("sixteen-letters-1"), Some("Bearer # ours")]
        {
            assert!(!check(header), "{header:?}");
        }
        let headers = with(X_API_KEY, "sixteen-letters-2");
        let holder = keys.check(&headers, Needs::Scope(Scope::Generate)).unwrap();
        assert_eq!(holder.name(), Some("line 4"));
        assert!(keys.check(&headers, Needs::Scope(Scope::Admin)).is_err());
        assert!(ApiKeys::default().check(&HeaderMap::new(), Needs::Scope(Scope::Admin)).is_ok());
        assert!(keys.check(&HeaderMap::new(), Needs::Nothing).is_ok());
    }

    #[test]
    fn keys_have_scopes_and_tokens_a_minute() {
        // The SHA-256 of `sixteen-letters-2`.
        let hash = sha256(b"sixteen-letters-2").to_hex();
        let text = format!(
            "[[key]]\nname = 'one'\nkey = 'sixteen-letters-1'\nscopes = ['generate']\n\
             tokens_per_minute = 100\n\
             [[key]]\nname = 'two'\nsha256 = '{hash}'\nscopes = ['metrics', 'admin']\n"
        );
        let keys = ApiKeys::parse_toml(&text, Path::new("keys.toml")).unwrap();
        let check = |key: &str, scope| keys.check(&with(X_API_KEY, key), Needs::Scope(scope));
        assert!(check("sixteen-letters-1", Scope::Metrics).is_err());
        assert!(check("sixteen-letters-2", Scope::Admin).unwrap().spend(1 << 40).is_ok());
        let one = check("sixteen-letters-1", Scope::Generate).unwrap();
        // More than ever fits is the request's fault, more than is left is a matter of time.
        let kind = |tokens| one.spend(tokens).unwrap_err().body()["error"]["code"].clone();
        assert_eq!(kind(101), "tokens_per_minute");
        assert!(one.spend(60).is_ok() && one.spend(0).is_ok());
        assert_eq!(kind(60), "rate_limit_exceeded");
        assert!(one.spend(40).is_ok(), "a refusal counts nothing");
    }

    #[test]
    fn pages_of_other_sites_do_not_pass() {
        let check = |host: &str, origin: Option<&str>| {
            let mut headers = with(HOST, host);
            if let Some(origin) = origin {
                headers.insert(ORIGIN, origin.parse().unwrap());
            }
            ApiKeys::default().check(&headers, Needs::Key).is_ok()
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
    fn no_error_repeats_a_secret() {
        let good = "[[key]]\nname = 'a'\nscopes = ['embed']\n";
        for (line, what) in [
            ("keys = 'tell-nobody-of-this'", "unknown field `keys`"),
            ("key = 'tell-nobody-of-this", "invalid literal string"),
            ("key = tell-nobody-of-this", "invalid boolean"),
            ("key = 'tell-nobody-of-this' 'tell-nobody-of-this'", ""),
            ("key = ['tell-nobody-of-this']", "key is no text"),
            ("key = 314159265358979323", "key is no text"),
        ] {
            let text = format!("{good}{line}\n");
            let error = ApiKeys::parse_toml(&text, Path::new("keys.toml")).unwrap_err();
            let mut said = format!("{error:?}");
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(found) = cause {
                said += &format!(" {found}");
                cause = found.source();
            }
            assert!(!said.contains("nobody") && !said.contains("314159"), "{line}: {said}");
            assert!(error.to_string().contains("keys.toml is no file of keys: line 4"), "{error}");
            assert!(said.contains(what), "{line}: {said}");
        }
    }

    #[test]
    fn files_without_secrets_are_refused() {
        let parse = |text| ApiKeys::parse(text, Path::new("keys")).unwrap_err().to_string();
        assert_eq!(parse("# none\n"), "keys has no key");
        assert!(parse("\nshort\n").starts_with("line 2 of keys has a key of 5 characters"));
        let entry = "[[key]]\nname = 'a'\nkey = 'sixteen-letters-1'\n";
        let parse =
            |text: &str| ApiKeys::parse_toml(text, Path::new("keys.toml")).unwrap_err().to_string();
        for (text, expected) in [
            (String::new(), "keys.toml has no key"),
            (format!("{entry}scopes = []"), "key 'a' of keys.toml is for nothing"),
            (format!("{entry}scopes = ['all']"), "keys.toml is no file of keys"),
            (format!("{entry}scopes = ['embed']\nrate = 1"), "keys.toml is no file of keys"),
            (
                format!("{entry}scopes = ['embed']\ntokens_per_minute = 0"),
                "keys.toml is no file of keys",
            ),
            (
                format!("{entry}sha256 = '00'\nscopes = ['embed']"),
                "neither key nor sha256, or both",
            ),
            (
                "[[key]]\nname = 'a'\nsha256 = '00'\nscopes = ['embed']".to_owned(),
                "64 hexadecimal digits",
            ),
            (
                format!("{entry}scopes = ['embed']\n{entry}scopes = ['embed']"),
                "key 'a' of keys.toml is there twice",
            ),
        ] {
            assert!(parse(&text).contains(expected), "{text}: {}", parse(&text));
        }
    }
}
