//! Constants are computed while a template is compiled, before anything is counted, so products in
//! a template are bounded by looking at its tokens.
//!
//! Within a tag, no constant can be longer than the tag times all its numbers. Real templates
//! multiply by small ones.

use minijinja::Error;
use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;

use super::bounds::too_much;

/// Most bytes that the constants of a template may come to.
const CONSTANT_BYTES_MAX: u64 = 16 << 20;

/// Refuses a template whose products could be large.
pub(super) fn check(source: &str, syntax: &SyntaxConfig) -> Result<(), Error> {
    let mut total = 0u64;
    let mut tag = Tag::default();
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token?;
        match token {
            Token::BlockStart | Token::VariableStart => {
                tag = Tag { start: u64::from(span.start_offset), ..Tag::default() };
            }
            Token::BlockEnd | Token::VariableEnd if tag.multiplies => {
                let length = u64::from(span.end_offset).saturating_sub(tag.start).max(1);
                total = total.saturating_add(length.saturating_mul(tag.product.max(1)));
                if CONSTANT_BYTES_MAX < total {
                    let what = format!(
                        "a product of constants at line {} could come to more than \
                         {CONSTANT_BYTES_MAX} bytes",
                        span.start_line
                    );
                    return Err(too_much(what));
                }
            }
            Token::Mul => tag.multiplies = true,
            Token::Int(number) => tag.times(number),
            Token::Int128(_) => tag.times(u64::MAX),
            _ => {}
        }
    }
    Ok(())
}

#[derive(Default)]
struct Tag {
    start: u64,
    multiplies: bool,
    product: u64,
}

impl Tag {
    fn times(&mut self, number: u64) {
        self.product = self.product.max(1).saturating_mul(number.max(1));
    }
}
