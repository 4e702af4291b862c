//! Models that come and go while the server runs: loaded, forgotten, loaded again, adapters among them. Only what
//! lies in the folder of models is loaded, and only what fits: its bytes are known before anything of it is read.
//!
//! An adapter is served as a model of its own, beside the weights of its base, and counts as one.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::intake::Body;
use crate::model::{LoadedModel, ModelSource};
use crate::models::{Memory, NoRoom};
use crate::server::Shared;

/// Lays a model out, takes its bytes, and only then reads its weights.
pub type Loader = dyn Fn(&ModelSource, &Memory) -> Result<LoadedModel, Box<dyn Error + Send + Sync>>
    + Send
    + Sync;

/// Loads a model.
pub(crate) async fn load(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let read = |mut fields: Fields| {
        let name = take_name(&mut fields, "model")?;
        let path: Option<String> = fields.take("path")?;
        fields.finish()?;
        Ok((name, path))
    };
    let (name, path) = shared.intake.prepare(body, read).await?;
    let path = within(&shared, "path", path.as_deref().unwrap_or(&name))?;
    shared.models.serving()?.check_absent(&name)?;
    let source = ModelSource { name, path, adapter: None };
    bring(shared, source).await
}

/// Loads a model again, from where it was loaded. It is served as it was until then.
pub(crate) async fn reload(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let name = shared.intake.prepare(body, |fields| only_name(fields, "model")).await?;
    let source = shared.models.serving()?.find(Some(&name))?.source.clone();
    bring(shared, source).await
}

/// Forgets a model.
pub(crate) async fn unload(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let name = shared.intake.prepare(body, |fields| only_name(fields, "model")).await?;
    forget(&shared, &name).await
}

/// Loads an adapter beside a model, as vLLM's request of this name does.
pub(crate) async fn load_adapter(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let read = |mut fields: Fields| {
        let name = take_name(&mut fields, "lora_name")?;
        let path: String = fields.need("lora_path")?;
        let base: Option<String> = fields.take("base_model_name")?;
        fields.lacking("load_inplace", &[json!(false)])?;
        fields.finish()?;
        Ok((name, path, base))
    };
    let (name, path, base) = shared.intake.prepare(body, read).await?;
    let adapter = within(&shared, "lora_path", &path)?;
    let serving = shared.models.serving()?;
    serving.check_absent(&name)?;
    let base = serving.find(base.as_deref())?.source.clone();
    if base.adapter.is_some() {
        let message = format!("'{}' is an adapter itself", base.name);
        return Err(ApiError::field("base_model_name", message));
    }
    bring(shared, ModelSource { name, path: base.path, adapter: Some(adapter) }).await
}

/// Forgets an adapter.
pub(crate) async fn unload_adapter(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let name = shared.intake.prepare(body, |fields| only_name(fields, "lora_name")).await?;
    if shared.models.serving()?.find(Some(&name))?.source.adapter.is_none() {
        return Err(ApiError::field("lora_name", format!("'{name}' is no adapter")));
    }
    forget(&shared, &name).await
}

fn take_name(fields: &mut Fields, field: &'static str) -> Result<String, ApiError> {
    let name: String = fields.need(field)?;
    match name.is_empty() || 256 < name.len() || name.chars().any(char::is_control) {
        true => Err(ApiError::field(field, format!("{field} is no name of 1 to 256 characters"))),
        false => Ok(name),
    }
}

fn only_name(mut fields: Fields, field: &'static str) -> Result<String, ApiError> {
    let name = take_name(&mut fields, field)?;
    fields.finish()?;
    Ok(name)
}

/// A path within the folder of models: neither its words nor a link in it lead out.
fn within(shared: &Shared, field: &'static str, path: &str) -> Result<PathBuf, ApiError> {
    let Some(folder) = &shared.models_folder else {
        let message = "the server was started without --models-dir: it loads nothing more";
        return Err(ApiError::invalid(message));
    };
    let refuse = |what| Err(ApiError::field(field, format!("{field} '{path}' {what}")));
    if !Path::new(path).components().all(|part| matches!(part, Component::Normal(_))) {
        return refuse("is not a path below the folder of models");
    }
    match folder.join(path).canonicalize() {
        Ok(found) if found.starts_with(folder) && found != *folder => Ok(found),
        // Whether something is there that a link leads to is not told.
        _ => refuse("is nothing in the folder of models"),
    }
}

/// Loads a model and serves it. Who asked may leave: it is brought to its end.
async fn bring(shared: Arc<Shared>, source: ModelSource) -> Result<Json<Value>, ApiError> {
    let Ok(loading) = Arc::clone(&shared.loading).try_lock_owned() else {
        return Err(ApiError::conflict("loading", "another model is being loaded"));
    };
    let bringing = tokio::spawn(async move {
        let name = source.name.clone();
        let with = Arc::clone(&shared);
        let load = move || {
            let loaded = (with.loader)(&source, &with.models.memory);
            loaded.map_err(|error| refusal(&*error))
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        let loaded = loaded.map_err(|_| ApiError::failed("loading the model failed here"))??;
        let added = shared.models.add(loaded, (shared.now)());
        if let Some(mut replaced) = added.map_err(ApiError::failed)?? {
            // Then its memory is free. Longer than this it may take, and will be free all the same.
            let _ = timeout(shared.drain_timeout, replaced.changed()).await;
        }
        drop(loading);
        tracing::info!(model = name, "loaded");
        shared.models.serving()?.entry(&name).map(Json)
    });
    bringing.await.map_err(|_| ApiError::failed("loading the model failed here"))?
}

/// Serves a model no more, and waits for the end of what runs.
async fn forget(shared: &Arc<Shared>, name: &str) -> Result<Json<Value>, ApiError> {
    let mut ended = shared.models.remove(name)?;
    // An error says that the sender is gone, which is the end.
    let has_ended = timeout(shared.drain_timeout, ended.changed()).await.is_ok();
    tracing::info!(model = name, "unloaded");
    let status = if has_ended { "unloaded" } else { "answering what was asked before" };
    Ok(Json(json!({ "id": name, "object": "model", "status": status })))
}

/// What a model was not loaded for.
fn refusal(error: &(dyn Error + Send + Sync + 'static)) -> ApiError {
    let mut text = error.to_string();
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(found) = cause {
        if let Some(no_room) = found.downcast_ref::<NoRoom>() {
            return ApiError::conflict("memory_budget", no_room);
        }
        let said = found.to_string();
        if !text.ends_with(&said) {
            // Writing to a text cannot fail.
            let _ = write!(text, ": {said}");
        }
        cause = found.source();
    }
    ApiError::invalid(text)
}
