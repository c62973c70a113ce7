use std::pin::pin;

use futures_util::future::{Either, select};
use tokio::sync::mpsc;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{AsyncMessage, Client, Config, Socket};

/// A connection of its own, which hears notifications.
pub(crate) struct Line {
    /// Holds the connection open.
    _client: Client,
    payloads: mpsc::UnboundedReceiver<String>,
}

impl Line {
    /// Connects, and runs the statement that asks for notifications.
    pub(crate) async fn open<T>(config: Config, tls: T, listen: &str) -> Result<Line, tokio_postgres::Error>
    where
        T: MakeTlsConnect<Socket> + Send,
        T::Stream: Send + 'static,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        let (client, mut connection) = config.connect(tls).await?;
        let (sender, payloads) = mpsc::unbounded_channel();
        // Ends with the connection, or with the client that holds it open.
        let driving = Box::pin(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if let AsyncMessage::Notification(notification) = message {
                    let _ = sender.send(notification.payload().to_owned());
                }
            }
        });
        // Only then a task of its own, which would outlive whoever is tired of waiting for the answer.
        match select(pin!(client.batch_execute(listen)), driving).await {
            Either::Left((listening, driving)) => {
                listening?;
                tokio::spawn(driving);
            }
            Either::Right(((), listening)) => listening.await?,
        }
        Ok(Line { _client: client, payloads })
    }

    /// What is heard next; `None` when the connection has ended.
    pub(crate) async fn hear(&mut self) -> Option<String> {
        self.payloads.recv().await
    }
}
