//! The most probable tokens of each place of a prompt, as the JSON of servers has them. Reads values, and does not judge
//! what they come to: imports and remote teachers do that, each in its own way.

use serde_json::Value;

/// Python writes the logarithm of 0 as `-Infinity`, which is no JSON: outside of strings it becomes null.
pub(crate) fn without_infinities(line: &str) -> std::borrow::Cow<'_, str> {
    if !line.contains("-Infinity") {
        return line.into();
    }
    let (mut text, mut in_string, mut escaped) = (String::with_capacity(line.len()), false, false);
    let mut rest = line;
    while let Some(character) = rest.chars().next() {
        if !in_string && let Some(after) = rest.strip_prefix("-Infinity") {
            text.push_str("null");
            rest = after;
            continue;
        }
        in_string ^= character == '"' && !escaped;
        escaped = character == '\\' && !escaped;
        text.push(character);
        rest = &rest[character.len_utf8()..];
    }
    text.into()
}

/// One most probable id of a place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Entry {
    pub id: u32,
    pub log_prob: f32,
    pub rank: Option<u64>,
}

/// What a record says of one place; `None` for nothing.
pub(crate) type Place = Option<Vec<Entry>>;

/// `[null, {"id": {"logprob": .., "rank": ..}, ..}, [{"token": "token_id:3", "logprob": ..}, ..], ..]`
pub(crate) fn server_places(value: &Value, field: &str) -> Result<Vec<Place>, String> {
    let places = value.as_array().ok_or_else(|| format!("`{field}` is not a list"))?;
    let place = |(number, place): (usize, &Value)| {
        let wrong = |problem: &str| format!("place {number} of `{field}` {problem}");
        match place {
            Value::Null => Ok(None),
            Value::Object(map) => {
                let entries = map.iter().filter_map(|(id, value)| match id.parse() {
                    Ok(id) => entry(id, value.get("logprob").unwrap_or(value), value.get("rank")).transpose(),
                    Err(_) => Some(Err(format!("has the key `{id}`, which is no token id"))),
                });
                entries.collect::<Result<_, String>>().map(Some).map_err(|problem| wrong(&problem))
            }
            Value::Array(list) => {
                let entries = list.iter().filter_map(|item| match listed_id(item) {
                    Some(id) => entry(id, item.get("logprob").unwrap_or(&Value::Null), item.get("rank")).transpose(),
                    None => Some(Err("has an entry without `token_id` or a `token` like \"token_id:3\"".into())),
                });
                entries.collect::<Result<_, String>>().map(Some).map_err(|problem| wrong(&problem))
            }
            _ => Err(wrong("is neither null nor a list nor an object")),
        }
    };
    places.iter().enumerate().map(place).collect()
}

fn listed_id(item: &Value) -> Option<u32> {
    let id = item.get("token_id").or_else(|| item.get("id")).and_then(Value::as_u64);
    let named = || item.get("token")?.as_str()?.strip_prefix("token_id:")?.parse().ok();
    id.or_else(named).and_then(|id| id.try_into().ok())
}

/// An entry; `None` for a probability of 0, which some write to fill lists up.
pub(super) fn entry(id: u32, log_prob: &Value, rank: Option<&Value>) -> Result<Option<Entry>, String> {
    match log_prob {
        Value::Null => Ok(None),
        Value::Number(number) => {
            let log_prob = number.as_f64().unwrap_or(f64::NAN) as f32;
            Ok(Some(Entry { id, log_prob, rank: rank.and_then(Value::as_u64) }))
        }
        other => Err(format!("has the log-probability {other} for the id {id}")),
    }
}
