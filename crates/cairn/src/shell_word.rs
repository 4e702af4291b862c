//! Paths in commands that are printed to be copied.

use std::path::Path;

/// What a shell reads as one word: the path as it is, or in quotes where it holds anything that a shell
/// does not take literally.
pub(crate) fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_one_word() {
        let check = |path: &str, expected: &str| assert_eq!(shell_word(Path::new(path)), expected);
        check("runs/quickstart/recipe.toml", "runs/quickstart/recipe.toml");
        check("My Documents/Löwe", "'My Documents/Löwe'");
        check("it's $HOME", r"'it'\''s $HOME'");
        check("", "''");
    }
}
