use std::time::Duration;

use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, Error, Socket};

/// One more connection, outside of any pool, with an option that a server of its own would obey; `None` if it took too long.
pub(crate) async fn open_another<T>(
    mut config: Config,
    tls: T,
    limit: Duration,
    option: Option<String>,
) -> Option<Result<Client, Error>>
where
    T: MakeTlsConnect<Socket> + Send,
    T::Stream: Send + 'static,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    if let Some(option) = option {
        let options = config.get_options().map_or(option.clone(), |before| format!("{before} {option}"));
        config.options(options);
    }
    config.application_name("lastprice probe");
    let connected = tokio::time::timeout(limit, config.connect(tls)).await.ok()?;
    Some(connected.map(|(client, connection)| {
        tokio::spawn(async move { drop(connection.await) });
        client
    }))
}
