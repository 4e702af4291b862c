//! Model specs, recipes, dtypes and schema versions: what a run is, as data.
