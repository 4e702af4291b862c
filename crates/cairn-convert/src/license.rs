//! What a model's folder says about the terms of its use: front matter of the `README.md`, and files
//! with a license's text. What nothing says stays unknown; nothing is guessed.

use std::path::Path;

use cairn_artifacts::FileError;
use cairn_artifacts::leanpack::License;

/// The file whose front matter may state a license.
pub const README: &str = "README.md";
/// Beginnings of the names of files with terms, in upper case.
const TERMS: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY"];
/// Longest license name, in bytes; longer ones are no names.
const NAME_BYTES_MAX: usize = 200;

/// Whether a file of that name holds terms of use.
pub fn is_terms(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    TERMS.iter().any(|beginning| name.starts_with(beginning))
}

/// Reads what `folder` says; `files` are the names of those that are packed.
///
/// # Errors
///
/// [`FileError`] if a README that is there cannot be read.
pub fn license(folder: &Path, files: &[String]) -> Result<License, FileError> {
    let readme = folder.join(README);
    let id = match files.iter().any(|file| file == README) {
        true => {
            let bytes = std::fs::read(&readme).map_err(FileError::on("read", &readme))?;
            stated(&String::from_utf8_lossy(&bytes))
        }
        false => None,
    };
    Ok(License {
        stated_in: id.as_ref().map(|_| README.to_owned()),
        id,
        files: files.iter().filter(|file| is_terms(file)).cloned().collect(),
    })
}

/// The license that the front matter of a README states: `license_name` where `license` is `other`.
fn stated(readme: &str) -> Option<String> {
    let mut lines = readme.trim_start_matches('\u{feff}').lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let matter: Vec<&str> = lines.take_while(|line| line.trim_end() != "---").collect();
    let field = |name: &str| {
        let mut values =
            matter.iter().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let text = values.next()?.trim().trim_matches(['"', '\'']);
        let is_name = !text.is_empty() && text.len() <= NAME_BYTES_MAX;
        is_name.then(|| text.to_owned())
    };
    match field("license") {
        Some(license) if license == "other" => field("license_name").or(Some(license)),
        license => license,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_matter_states_a_license_and_prose_does_not() {
        let check = |readme: &str, expected: Option<&str>| {
            assert_eq!(stated(readme).as_deref(), expected, "{readme:?}");
        };
        check("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model", Some("apache-2.0"));
        check("---\r\nlicense: \"mit\"\r\n---\r\n", Some("mit"));
        check("---\nlicense: other\nlicense_name: qwen-research\n---\n", Some("qwen-research"));
        check("---\nlicense: other\n---\n", Some("other"));
        check("---\nlicense:\n- mit\n---\n", None);
        check("---\nlanguage: en\n---\nlicense: mit\n", None);
        check("# Model\nlicense: mit\n", None);
        check("", None);
    }

    #[test]
    fn files_with_terms_are_known_by_their_names() {
        for name in ["LICENSE", "LICENSE.txt", "license-MIT", "Notice.md", "COPYING"] {
            assert!(is_terms(name), "{name}");
        }
        assert!(!is_terms("README.md") && !is_terms("model.safetensors"));
    }
}
