//! What an output follows: which tokens may come next, told to the engine token by token.

use std::fmt;

/// Which tokens may come next, as a grammar or a list of choices says. The engine asks it before each choice, and
/// tells it each token that was chosen; the tokens of one output, in order.
pub trait Constraint: fmt::Debug + Send {
    /// Sets the bits of the tokens that may come next, bit `t % 32` of word `t / 32`, and clears the others.
    ///
    /// # Errors
    ///
    /// Says why nothing can be told; the request fails with it.
    fn allow(&mut self, allowed: &mut [u32]) -> Result<(), String>;

    /// Goes on past a token that was allowed.
    ///
    /// # Errors
    ///
    /// Says why that cannot be; the request fails with it.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Whether nothing can come any more: the output is complete.
    fn is_complete(&self) -> bool;

    /// The same, at the same place.
    fn boxed_clone(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}
