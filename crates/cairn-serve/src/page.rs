//! A page to try a prompt: one file that asks nobody but this server. It holds nothing of the model, and needs no
//! key itself; what it asks for does.

use std::sync::OnceLock;

use axum::http::header::{CONTENT_SECURITY_POLICY, REFERRER_POLICY};
use axum::response::{Html, IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ring::digest::{SHA256, digest};

const PAGE: &str = include_str!("page.html");

/// The page.
pub(crate) async fn page() -> Response {
    static POLICY: OnceLock<String> = OnceLock::new();
    let policy = POLICY.get_or_init(policy).as_str();
    let head = [(CONTENT_SECURITY_POLICY, policy), (REFERRER_POLICY, "no-referrer")];
    (head, Html(PAGE)).into_response()
}

/// Nothing runs in the page but its own script, and that speaks with this server alone.
fn policy() -> String {
    let [script, style] = ["script", "style"].map(|tag| {
        let hash = digest(&SHA256, within(tag).as_bytes());
        format!("{tag}-src 'sha256-{}'", BASE64_STANDARD.encode(hash))
    });
    format!(
        "default-src 'none'; {script}; {style}; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    )
}

/// What the page has between a tag and its end.
fn within(tag: &str) -> &'static str {
    let (_, rest) = PAGE.split_once(&format!("<{tag}>")).expect("the page has one");
    rest.split_once(&format!("</{tag}>")).expect("and its end").0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_else_and_writes_no_markup() {
        let policy = policy();
        assert_eq!(policy.matches("'sha256-").count(), 2);
        assert!(!policy.contains("unsafe"));
        for outside in ["http://", "https://", " src=", "@import", "url("] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
        // A policy by hashes lets no attribute run, and what comes from outside becomes text alone.
        for markup in [
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            " style=",
            " onclick",
        ] {
            assert!(!PAGE.contains(markup), "{markup}");
        }
        assert_eq!([PAGE.matches("<script").count(), PAGE.matches("<style").count()], [1, 1]);
    }
}
