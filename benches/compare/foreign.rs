//! The neutral client as a store to be loaded: `etcd-client`, which belongs to neither side.

use std::time::Duration;

use bytes::Bytes;
use etcd_client::{
    Client, Compare, CompareOp, Error, GetOptions, LeaseKeepAliveStream, LeaseKeeper, Txn, TxnOp,
    WatchOptions, WatchStream,
};
use mainstay::load::{Failure, Lease, Read, Store, Watch, WatchFrom};

/// How long a watch may take to be in place, and a renewal to be answered: streams have no deadline.
const STREAM_LIMIT: Duration = Duration::from_secs(30);
/// The past comes in large messages from a server that may fill them.
const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// A connection by the neutral client.
#[derive(Clone)]
pub struct Foreign(pub Client);

fn failure(error: Error) -> Failure {
    Failure(match error {
        Error::GRpcStatus(status) => format!("{:?}: {}", status.code(), status.message()),
        other => other.to_string(),
    })
}

async fn limited<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
    let answer = tokio::time::timeout(STREAM_LIMIT, call).await;
    answer.map_err(|_| Failure(format!("no answer on a stream in {STREAM_LIMIT:?}")))?.map_err(failure)
}

impl Store for Foreign {
    type Watch = ForeignWatch;
    type Lease = ForeignLease;

    async fn put(&mut self, key: Bytes, value: Bytes) -> Result<(), Failure> {
        self.0.put(key, value, None).await.map(drop).map_err(failure)
    }

    async fn put_all(&mut self, keys: Vec<Bytes>, value: Bytes) -> Result<(), Failure> {
        let puts: Vec<TxnOp> = keys.into_iter().map(|key| TxnOp::put(key, value.clone(), None)).collect();
        self.0.txn(Txn::new().and_then(puts)).await.map(drop).map_err(failure)
    }

    async fn range(&mut self, read: Read) -> Result<u64, Failure> {
        let mut options = GetOptions::new();
        if !read.end.is_empty() {
            options = options.with_range(read.end);
        }
        if read.serializable {
            options = options.with_serializable();
        }
        let answer = self.0.get(read.key, Some(options)).await.map_err(failure)?;
        Ok(answer.kvs().len() as u64)
    }

    async fn txn(&mut self, key: Bytes, value: Bytes) -> Result<(), Failure> {
        let put = TxnOp::put(key.clone(), value, None);
        let txn = Txn::new()
            .when([Compare::version(key.clone(), CompareOp::Greater, 0)])
            .and_then([put.clone(), TxnOp::get(key, None)])
            .or_else([put]);
        self.0.txn(txn).await.map(drop).map_err(failure)
    }

    async fn watch(&mut self, from: WatchFrom) -> Result<ForeignWatch, Failure> {
        let options = WatchOptions::new().with_range(from.end).with_start_revision(from.revision);
        let mut client = self.0.watch_client().max_decoding_message_size(MESSAGE_BYTES_MAX);
        let mut watch = limited(client.watch(from.key, Some(options))).await?;
        match limited(watch.message()).await? {
            Some(answer) if answer.created() && !answer.canceled() => Ok(ForeignWatch(watch)),
            Some(answer) => Err(Failure(format!("no watch: {}", answer.cancel_reason()))),
            None => Err(Failure("the stream of a watch ended".to_owned())),
        }
    }

    async fn lease(&mut self, ttl_s: i64) -> Result<ForeignLease, Failure> {
        let granted = self.0.lease_grant(ttl_s, None).await.map_err(failure)?;
        let (keeper, answers) = limited(self.0.lease_keep_alive(granted.id())).await?;
        Ok(ForeignLease { keeper, answers })
    }
}

/// A watch on a stream of its own.
pub struct ForeignWatch(WatchStream);

impl Watch for ForeignWatch {
    async fn next(&mut self, each: &mut (dyn FnMut(&[u8]) + Send)) -> Result<(), Failure> {
        match self.0.message().await.map_err(failure)? {
            Some(answer) if answer.canceled() => {
                Err(Failure(format!("watch canceled: {}", answer.cancel_reason())))
            }
            Some(answer) => {
                answer.events().iter().for_each(|event| each(event.kv().map_or(&[], |kv| kv.value())));
                Ok(())
            }
            None => Err(Failure("the stream of a watch ended".to_owned())),
        }
    }
}

/// A lease with a stream of its own, as this client has it.
pub struct ForeignLease {
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

impl Lease for ForeignLease {
    async fn keep(&mut self) -> Result<(), Failure> {
        limited(self.keeper.keep_alive()).await?;
        match limited(self.answers.message()).await? {
            Some(answer) if answer.ttl() > 0 => Ok(()),
            Some(_) => Err(Failure("the lease is gone".to_owned())),
            None => Err(Failure("the stream of a lease ended".to_owned())),
        }
    }
}
