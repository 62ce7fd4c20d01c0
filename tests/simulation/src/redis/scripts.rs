//! Scripts, run by the interpreter of Redis itself, Lua 5.1.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use mlua::{Function, Lua, Table, Value, Variadic};

use super::resp::Reply;

/// What a script calls.
type Call = Arc<Mutex<dyn FnMut(&[Vec<u8>]) -> Reply + Send>>;

pub struct Scripts {
    lua: Lua,
    /// By their SHA-1.
    known: HashMap<String, Function>,
}

impl Scripts {
    /// Of a server that carries out what they call by `call`.
    pub fn new(call: impl FnMut(&[Vec<u8>]) -> Reply + Send + 'static) -> Self {
        let lua = Lua::new();
        let call: Call = Arc::new(Mutex::new(call));
        let redis = lua.create_table().unwrap();
        for (name, raises) in [("call", true), ("pcall", false)] {
            let call = Arc::clone(&call);
            let function = lua.create_function(move |lua, words: Variadic<Value>| {
                let words: Vec<_> = words.iter().map(bytes_of).collect();
                let reply = (call.lock().unwrap())(&words);
                match reply {
                    Reply::Error(text) if raises => Err(mlua::Error::runtime(text)),
                    reply => to_lua(lua, &reply),
                }
            });
            redis.set(name, function.unwrap()).unwrap();
        }
        lua.globals().set("redis", redis).unwrap();
        Self {
            lua,
            known: HashMap::new(),
        }
    }

    /// The server has forgotten all of them.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    /// Learns a script, and answers its SHA-1.
    pub fn learn(&mut self, text: &[u8]) -> String {
        let sha = sha1_smol::Sha1::from(text).digest().to_string();
        if !self.known.contains_key(&sha) {
            let function = self.lua.load(text).into_function().unwrap();
            self.known.insert(sha.clone(), function);
        }
        sha
    }

    /// `EVALSHA`. `None`: there is no such script.
    pub fn run(&self, sha: &str, keys: &[Vec<u8>], arguments: &[Vec<u8>]) -> Option<Reply> {
        let function = self.known.get(sha)?;
        for (name, words) in [("KEYS", keys), ("ARGV", arguments)] {
            let words = words.iter().map(|word| self.lua.create_string(word));
            let words: Vec<_> = words.collect::<Result<_, _>>().unwrap();
            self.lua.globals().set(name, words).unwrap();
        }
        Some(match function.call::<Value>(()) {
            Ok(value) => from_lua(&value),
            // The scripts of the library raise none: this is a mistake of somebody's.
            Err(error) => panic!("a script failed: {error}"),
        })
    }
}

fn bytes_of(value: &Value) -> Vec<u8> {
    match value {
        Value::String(text) => text.as_bytes().to_vec(),
        Value::Integer(number) => number.to_string().into_bytes(),
        Value::Number(number) if number.fract() == 0.0 => format!("{number:.0}").into_bytes(),
        value => panic!("a command with {value:?} in it"),
    }
}

/// As Redis does it ("Data type conversion" of its Lua API).
fn to_lua(lua: &Lua, reply: &Reply) -> mlua::Result<Value> {
    let table = |field, text: &str| {
        let table = lua.create_table()?;
        table.set(field, text)?;
        Ok(Value::Table(table))
    };
    match reply {
        Reply::Simple(text) => table("ok", text),
        Reply::Error(text) => table("err", text),
        Reply::Int(number) => Ok(Value::Number(*number as f64)),
        Reply::Bulk(bytes) => Ok(Value::String(lua.create_string(bytes)?)),
        Reply::Nil => Ok(Value::Boolean(false)),
        Reply::Array(items) => {
            let items = items.iter().map(|item| to_lua(lua, item));
            let items: Vec<_> = items.collect::<Result<_, _>>()?;
            Ok(Value::Table(lua.create_sequence_from(items)?))
        }
        reply => panic!("a script is answered {reply:?}"),
    }
}

fn from_lua(value: &Value) -> Reply {
    match value {
        Value::Nil | Value::Boolean(false) => Reply::Nil,
        Value::Boolean(true) => Reply::Int(1),
        Value::Integer(number) => Reply::Int(*number),
        Value::Number(number) => Reply::Int(*number as i64),
        Value::String(text) => Reply::Bulk(text.as_bytes().to_vec()),
        Value::Table(table) => from_table(table).unwrap(),
        value => panic!("a script answers {value:?}"),
    }
}

fn from_table(table: &Table) -> mlua::Result<Reply> {
    if let Some(error) = table.get::<Option<String>>("err")? {
        return Ok(Reply::Error(error));
    }
    let items = table.sequence_values::<Value>();
    let items: Vec<_> = items.collect::<Result<_, _>>()?;
    Ok(Reply::Array(items.iter().map(from_lua).collect()))
}
