//! `txn`: reads a transaction from standard input and runs it.

use std::io::{BufRead, IsTerminal};

use clap::Args;
use serde_json::{Value, json};

use super::Context;
use super::error::CliError;
use super::grammar::{parse_compare, parse_op};
use super::kv::{Show, kv_lines, range_json};
use super::output::{kv_json, say};
use crate::types::{Revision, Txn, TxnOp, TxnOpReply, TxnReply};

/// What `txn --help` says about its input.
const HELP: &str = "\
Standard input has three sections, each ended by an empty line: comparisons, the
requests to do when all of them hold, the requests to do otherwise.

  mod(\"key1\") > \"0\"

  put key1 \"overwrote key1\"

  put key1 \"created key1\"
  put key2 \"some extra key\"

A comparison is TARGET(\"KEY\") OP \"VALUE\" with value, version, create, mod or lease
as TARGET and =, !=, < or > as OP. A request is put, get or del as on the command
line. Lines that begin with # are comments.";

/// `mainstay txn`.
#[derive(Clone, Debug, Args)]
#[command(after_help = HELP)]
pub struct TxnCommand {
    /// Say which section is being read.
    #[arg(short, long)]
    pub interactive: bool,

    /// Print keys and values as hexadecimal escapes.
    #[arg(long)]
    pub hex: bool,

    /// End with exit code 4 when a comparison did not hold.
    #[arg(long)]
    pub fail: bool,
}

/// Runs `txn`.
pub async fn txn(context: &Context, command: TxnCommand) -> Result<(), CliError> {
    let stdin = std::io::stdin();
    let prompts = command.interactive || stdin.is_terminal();
    let txn = read_txn(stdin.lock(), |prompt| {
        if prompts {
            say(prompt);
        }
    })?;
    let asked = (txn.success.clone(), txn.failure.clone());
    let (revision, reply) = context.api().await?.txn(txn).await?;
    let out = &context.out;
    if out.is_json() {
        out.json(&txn_json(revision, &reply))?;
    } else {
        let ops = if reply.succeeded { asked.0 } else { asked.1 };
        let mut text = if reply.succeeded { b"SUCCESS\n".to_vec() } else { b"FAILURE\n".to_vec() };
        for (op, response) in ops.iter().zip(&reply.responses) {
            text.push(b'\n');
            text.extend(response_lines(op, response, command.hex));
        }
        out.raw(&text)?;
    }
    if command.fail && !reply.succeeded {
        return Err(CliError::Conflict("a comparison did not hold".to_owned()));
    }
    Ok(())
}

/// Reads the three sections. `prompt` is told what comes next.
fn read_txn(input: impl BufRead, prompt: impl Fn(&str)) -> Result<Txn, CliError> {
    let mut txn = Txn::default();
    let mut section = 0;
    let prompts = ["compares:", "success requests (get, put, del):", "failure requests (get, put, del):"];
    prompt(prompts[0]);
    for (number, line) in input.lines().enumerate() {
        let line =
            line.map_err(|e| CliError::io(format!("reading line {} of the transaction", number + 1), e))?;
        let line = line.trim();
        if line.starts_with('#') {
            continue;
        }
        if line.is_empty() {
            section += 1;
            match prompts.get(section) {
                Some(text) => prompt(text),
                None => return Ok(txn),
            }
            continue;
        }
        let at = |error: CliError| CliError::Usage(format!("line {}: {error}", number + 1));
        match section {
            0 => txn.compare.push(parse_compare(line).map_err(at)?),
            1 => txn.success.push(parse_op(line).map_err(at)?),
            _ => txn.failure.push(parse_op(line).map_err(at)?),
        }
    }
    // The input may end instead of the empty lines.
    Ok(txn)
}

fn response_lines(op: &TxnOp, response: &TxnOpReply, hex: bool) -> Vec<u8> {
    let show = Show { hex, ..Show::default() };
    match response {
        TxnOpReply::Range(reply) => match op {
            TxnOp::Range(query) if query.count_only => format!("{}\n", reply.count).into_bytes(),
            TxnOp::Range(query) => kv_lines(&reply.kvs, Show { keys_only: query.keys_only, ..show }),
            _ => kv_lines(&reply.kvs, show),
        },
        TxnOpReply::Put { prev } => [b"OK\n".to_vec(), kv_lines(prev.as_slice(), show)].concat(),
        TxnOpReply::DeleteRange { deleted, prev } => {
            [format!("{deleted}\n").into_bytes(), kv_lines(prev, show)].concat()
        }
        TxnOpReply::Txn(inner) => {
            if inner.succeeded {
                b"SUCCESS\n".to_vec()
            } else {
                b"FAILURE\n".to_vec()
            }
        }
    }
}

fn txn_json(revision: Revision, reply: &TxnReply) -> Value {
    let responses: Vec<Value> = reply
        .responses
        .iter()
        .map(|response| match response {
            TxnOpReply::Range(range) => json!({ "get": range_json(revision, range, true) }),
            TxnOpReply::Put { prev } => {
                json!({ "put": { "prev_kv": prev.as_ref().map(|kv| kv_json(kv, true)) } })
            }
            TxnOpReply::DeleteRange { deleted, prev } => {
                let prev: Vec<Value> = prev.iter().map(|kv| kv_json(kv, true)).collect();
                json!({ "del": { "deleted": deleted, "prev_kvs": prev } })
            }
            TxnOpReply::Txn(inner) => json!({ "txn": txn_json(revision, inner) }),
        })
        .collect();
    json!({ "revision": revision.0, "succeeded": reply.succeeded, "responses": responses })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Txn, CliError> {
        read_txn(text.as_bytes(), |_| ())
    }

    #[test]
    fn three_sections_end_with_empty_lines_or_the_end_of_input() {
        let txn = read("mod(\"a\") > \"0\"\n\nput a b\n\n# otherwise\nput a c\nget a\n\nignored\n").unwrap();
        assert_eq!((txn.compare.len(), txn.success.len(), txn.failure.len()), (1, 1, 2));
        let txn = read("\nput a b").unwrap();
        assert_eq!((txn.compare.len(), txn.success.len(), txn.failure.len()), (0, 1, 0));
        assert_eq!(read("").unwrap(), Txn::default());
    }

    #[test]
    fn an_error_names_its_line() {
        let message = read("mod(\"a\") > \"0\"\n\nput a b\nfetch a\n").unwrap_err().to_string();
        assert!(message.starts_with("line 4: `fetch a`"), "{message}");
    }
}
