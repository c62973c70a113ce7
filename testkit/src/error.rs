use std::{error::Error as StdError, fmt, sync::Arc};

/// What went wrong while a server or a database was made ready, and what to do about it.
///
/// `Display` is one sentence for the person who runs the tests; [`source`](StdError::source) has the cause.
/// `Debug`, which is what `unwrap()` prints, shows both.
///
/// ```
/// # async fn example() {
/// if let Err(error) = lastprice_testkit::TestDatabase::new().await {
///     // "found no PostgreSQL server on this machine: … apt-get install postgresql …"
///     eprintln!("{error}");
/// }
/// # }
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Short for the results of this crate.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Error {
        Error(Arc::new(Inner { message: message.into(), source: None }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        let mut source = self.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// Puts our sentence in front of somebody else's error.
pub(crate) trait Context<T> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for Result<T, E> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error(Arc::new(Inner { message: message(), source: Some(source.into()) })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_our_sentence_and_debug_is_the_whole_chain() {
        let cause = std::io::Error::other("disk full");
        let error = Err::<(), _>(cause).context(|| "cannot copy".to_owned()).unwrap_err();
        assert_eq!(error.to_string(), "cannot copy");
        assert_eq!(format!("{error:?}"), "cannot copy: disk full");
        assert_eq!(error.clone().source().unwrap().to_string(), "disk full");
    }
}
