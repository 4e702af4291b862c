//! What a user can do about an error, apart from the error's own text.

/// Suggestions that go with an error; the command line prints each as a `hint:` line.
///
/// The error's text says what is wrong, with the values in it; a hint says what to change. An
/// error without a useful suggestion returns an empty list.
pub trait Hint {
    /// Returns one suggestion a line, most useful first.
    fn hints(&self) -> Vec<String>;
}
