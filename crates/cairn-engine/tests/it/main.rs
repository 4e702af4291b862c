//! The engine on the golden models.

#[cfg(test)]
mod adapters;
#[cfg(test)]
mod allocations;
#[cfg(test)]
mod batches;
#[cfg(test)]
mod beams;
#[cfg(test)]
mod compute;
#[cfg(test)]
mod goldens;
#[cfg(test)]
mod model;
#[cfg(test)]
mod prefixes;
#[cfg(test)]
mod prompt_logprobs;
#[cfg(test)]
mod requests;
#[cfg(test)]
mod speculation;
