//! A server that does nothing but answer, so that the report can say what a call costs at least.
//!
//! It is this program started again: the same gRPC library as Mainstay's, one process, the same
//! clients, a read's answer of the usual size made once.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mainstay::load::{Requests, Verb, value};
use mainstay::wire::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, RangeStreamResponse, ResponseHeader, TxnRequest, TxnResponse,
    kv_server::{Kv, KvServer},
};
use mainstay::wire::mvccpb::KeyValue;
use tonic::codegen::async_trait;
use tonic::{Request, Response, Status};

use super::{LIMIT, Row};
use crate::bench::{Bench, KEYS, Side, VALUE_BYTES, foreign, keys, measure};
use crate::cluster::{READY_LIMIT, connect, fresh_root};
use crate::figures::Figures;
use crate::process::{Process, free_port};

pub const ROWS: &[Row] = &[Row {
    name: "bare",
    load: "a server that answers every read with a constant, 256 clients, 100 connections",
    sides: &[Side::Bare],
    goals: &[],
    limit: LIMIT,
    run: |bench| Box::pin(bare(bench)),
}];

/// Serves until the process is killed.
pub fn serve(port: u16) -> Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let service = KvServer::new(Constant::new());
    Ok(runtime.block_on(tonic::transport::Server::builder().add_service(service).serve(address))?)
}

async fn bare(bench: &Bench) -> Result<Figures> {
    let (port, log) = (free_port(), fresh_root().join("bare.log"));
    let program = std::env::current_exe().context("finding this program")?;
    let server = Process::start(&program, &[format!("--serve-bare={port}")], &[], &log)?;
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(connect(&[format!("http://127.0.0.1:{port}")]).await);
    }
    let deadline = Instant::now() + READY_LIMIT;
    while let Err(error) = clients[0].get("ready?", None).await {
        ensure!(Instant::now() < deadline, "the bare server does not answer: {error}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let verb = Verb::Range { keys: 1, serializable: true };
    let workers = Requests::clients(&foreign(clients), 256, verb, &keys(KEYS), &value(VALUE_BYTES));
    let figures = measure(bench, &server, workers).await;
    drop(server);
    let _ = std::fs::remove_dir_all(log.parent().context("it is in a directory")?);
    figures
}

/// Knows one answer.
struct Constant(RangeResponse);

impl Constant {
    fn new() -> Constant {
        let (key, value) = (keys(KEYS).key(0), value(VALUE_BYTES));
        let kv = KeyValue { key, value, create_revision: 2, mod_revision: 2, version: 1, lease: 0 };
        let header =
            ResponseHeader { cluster_id: 1 << 60, member_id: 1 << 60, revision: 10_000, raft_term: 2 };
        Constant(RangeResponse { header: Some(header), kvs: vec![kv], more: false, count: 1 })
    }
}

fn refused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("this server only reads"))
}

#[async_trait]
impl Kv for Constant {
    type RangeStreamStream = tokio_stream::Empty<Result<RangeStreamResponse, Status>>;

    async fn range(&self, _: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        Ok(Response::new(self.0.clone()))
    }

    async fn range_stream(
        &self,
        _: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        refused()
    }

    async fn put(&self, _: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        refused()
    }

    async fn delete_range(
        &self,
        _: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        refused()
    }

    async fn txn(&self, _: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        refused()
    }

    async fn compact(&self, _: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        refused()
    }
}
