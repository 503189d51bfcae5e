use std::{borrow::Cow, fmt};

/// A metadata value.
///
/// # Example
/// ```
/// use lowbit_formats::gguf::{Array, Value};
///
/// assert_eq!(Value::U32(7).as_u64(), Some(7));
/// assert_eq!(Value::from("llama").as_str(), Some("llama"));
///
/// let tokens = Array::new(&["<s>".into(), "a".into()]).unwrap();
/// assert_eq!(tokens.iter().filter_map(|v| v.as_str().map(str::len)).sum::<usize>(), 4);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "Rust's own names")]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// UTF-8 by the specification, which files break.
    String(Cow<'a, [u8]>),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Values of one type, as they are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<'a> {
    kind: u32,
    len: usize,
    items: Cow<'a, [u8]>,
}

const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

/// Arrays in arrays in arrays … no file needs more.
const MAX_DEPTH: usize = 4;

impl<'a> Value<'a> {
    /// The text of a string that is UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(bytes) => str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// A non-negative integer of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(x) => Some(x.into()),
            Self::U16(x) => Some(x.into()),
            Self::U32(x) => Some(x.into()),
            Self::U64(x) => Some(x),
            Self::I8(x) => x.try_into().ok(),
            Self::I16(x) => x.try_into().ok(),
            Self::I32(x) => x.try_into().ok(),
            Self::I64(x) => x.try_into().ok(),
            _ => None,
        }
    }

    /// A float of any width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            _ => None,
        }
    }

    /// The items of an array.
    pub fn as_array(&self) -> Option<&Array<'a>> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }

    /// The value at the front of `bytes`, which starts with its type.
    pub(super) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first_chunk()?;
        Self::item(u32::from_le_bytes(*kind), rest, MAX_DEPTH).map(|(value, _)| value)
    }

    /// The value of type `kind` at the front of `bytes`, and its length.
    fn item(kind: u32, bytes: &'a [u8], depth: usize) -> Option<(Self, usize)> {
        fn number<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
            bytes.first_chunk().copied()
        }
        let len = item_len(kind, bytes, depth)?;
        let value = match kind {
            U8 => Self::U8(u8::from_le_bytes(number(bytes)?)),
            I8 => Self::I8(i8::from_le_bytes(number(bytes)?)),
            U16 => Self::U16(u16::from_le_bytes(number(bytes)?)),
            I16 => Self::I16(i16::from_le_bytes(number(bytes)?)),
            U32 => Self::U32(u32::from_le_bytes(number(bytes)?)),
            I32 => Self::I32(i32::from_le_bytes(number(bytes)?)),
            F32 => Self::F32(f32::from_le_bytes(number(bytes)?)),
            BOOL => Self::Bool(*bytes.first()? != 0),
            STRING => Self::String(bytes.get(8..len)?.into()),
            ARRAY => {
                let kind = u32::from_le_bytes(number(bytes)?);
                let count = u64::from_le_bytes(number(&bytes[4..])?);
                let items = bytes.get(12..len)?.into();
                Self::Array(Array { kind, len: usize::try_from(count).ok()?, items })
            }
            U64 => Self::U64(u64::from_le_bytes(number(bytes)?)),
            I64 => Self::I64(i64::from_le_bytes(number(bytes)?)),
            F64 => Self::F64(f64::from_le_bytes(number(bytes)?)),
            _ => return None,
        };
        Some((value, len))
    }

    fn kind(&self) -> u32 {
        match self {
            Self::U8(_) => U8,
            Self::I8(_) => I8,
            Self::U16(_) => U16,
            Self::I16(_) => I16,
            Self::U32(_) => U32,
            Self::I32(_) => I32,
            Self::F32(_) => F32,
            Self::Bool(_) => BOOL,
            Self::String(_) => STRING,
            Self::Array(_) => ARRAY,
            Self::U64(_) => U64,
            Self::I64(_) => I64,
            Self::F64(_) => F64,
        }
    }

    /// Type and value, as [`decode`](Self::decode) reads them.
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        to.extend(self.kind().to_le_bytes());
        self.encode_item(to);
    }

    fn encode_item(&self, to: &mut Vec<u8>) {
        match self {
            Self::U8(x) => to.extend(x.to_le_bytes()),
            Self::I8(x) => to.extend(x.to_le_bytes()),
            Self::U16(x) => to.extend(x.to_le_bytes()),
            Self::I16(x) => to.extend(x.to_le_bytes()),
            Self::U32(x) => to.extend(x.to_le_bytes()),
            Self::I32(x) => to.extend(x.to_le_bytes()),
            Self::F32(x) => to.extend(x.to_le_bytes()),
            Self::Bool(x) => to.push((*x).into()),
            Self::String(x) => {
                to.extend((x.len() as u64).to_le_bytes());
                to.extend_from_slice(x);
            }
            Self::Array(x) => {
                to.extend(x.kind.to_le_bytes());
                to.extend((x.len as u64).to_le_bytes());
                to.extend_from_slice(&x.items);
            }
            Self::U64(x) => to.extend(x.to_le_bytes()),
            Self::I64(x) => to.extend(x.to_le_bytes()),
            Self::F64(x) => to.extend(x.to_le_bytes()),
        }
    }
}

/// Numbers as they are; strings in quotes, without control characters; of long ones, the beginning.
///
/// # Example
/// ```
/// use lowbit_formats::gguf::{Array, Value};
///
/// assert_eq!(Value::from("a\nb").to_string(), r#""a\nb""#);
/// let tokens: Vec<Value> = (0..9).map(Value::U8).collect();
/// let tokens = Value::Array(Array::new(&tokens).unwrap());
/// assert_eq!(tokens.to_string(), "[0, 1, 2, 3, 4, 5, … 9 items]");
/// ```
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Characters of a string, and items of an array.
        const MOST: (usize, usize) = (60, 6);
        match self {
            Self::U8(x) => x.fmt(f),
            Self::I8(x) => x.fmt(f),
            Self::U16(x) => x.fmt(f),
            Self::I16(x) => x.fmt(f),
            Self::U32(x) => x.fmt(f),
            Self::I32(x) => x.fmt(f),
            Self::F32(x) => write!(f, "{x:?}"),
            Self::Bool(x) => x.fmt(f),
            Self::U64(x) => x.fmt(f),
            Self::I64(x) => x.fmt(f),
            Self::F64(x) => write!(f, "{x:?}"),
            Self::String(bytes) => {
                let text = String::from_utf8_lossy(bytes);
                let start: String =
                    text.chars().take(MOST.0).flat_map(char::escape_debug).collect();
                match text.chars().nth(MOST.0) {
                    None => write!(f, "\"{start}\""),
                    Some(_) => write!(f, "\"{start}…\" of {} bytes", bytes.len()),
                }
            }
            Self::Array(array) => {
                let items: Vec<_> =
                    array.iter().take(MOST.1).map(|item| item.to_string()).collect();
                let items = items.join(", ");
                match array.len() > MOST.1 {
                    false => write!(f, "[{items}]"),
                    true => write!(f, "[{items}, … {} items]", array.len()),
                }
            }
        }
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::String(text.as_bytes().into())
    }
}

impl<'a> Array<'a> {
    /// An array of `items`; `None` if they are not of one type, or none.
    pub fn new(items: &[Value<'_>]) -> Option<Self> {
        let kind = items.first()?.kind();
        if items.iter().any(|item| item.kind() != kind) {
            return None;
        }
        let mut bytes = Vec::new();
        items.iter().for_each(|item| item.encode_item(&mut bytes));
        Some(Self { kind, len: items.len(), items: bytes.into() })
    }

    /// An array of `texts`, which may be none.
    pub fn strings<'t>(texts: impl IntoIterator<Item = &'t str>) -> Self {
        let (mut len, mut bytes) = (0, Vec::new());
        for text in texts {
            len += 1;
            Value::from(text).encode_item(&mut bytes);
        }
        Self { kind: STRING, len, items: bytes.into() }
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Are there no items?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The items, decoded one after the other.
    pub fn iter(&self) -> impl Iterator<Item = Value<'_>> {
        let mut rest = &*self.items;
        (0..self.len).map_while(move |_| {
            let (value, len) = Value::item(self.kind, rest, MAX_DEPTH)?;
            rest = &rest[len..];
            Some(value)
        })
    }
}

/// The length of a value and the type before it, or `None` if it is of no known type or passes the
/// end of `bytes`.
pub(super) fn len(bytes: &[u8]) -> Option<usize> {
    let (kind, rest) = bytes.split_first_chunk()?;
    item_len(u32::from_le_bytes(*kind), rest, MAX_DEPTH).map(|len| 4 + len)
}

fn item_len(kind: u32, bytes: &[u8], depth: usize) -> Option<usize> {
    if let Some(len) = fixed_len(kind) {
        return (len <= bytes.len()).then_some(len);
    }
    match kind {
        STRING => {
            let len = usize::try_from(u64::from_le_bytes(*bytes.first_chunk()?)).ok()?;
            let end = len.checked_add(8)?;
            (end <= bytes.len()).then_some(end)
        }
        ARRAY => {
            let kind = u32::from_le_bytes(*bytes.first_chunk()?);
            let count = u64::from_le_bytes(*bytes.get(4..)?.first_chunk()?);
            let count = usize::try_from(count).ok()?;
            let end = match fixed_len(kind) {
                Some(len) => count.checked_mul(len)?.checked_add(12)?,
                None if depth == 0 => return None,
                // Every item takes at least 8 bytes, so that this ends with the file.
                None => {
                    let mut at: usize = 12;
                    for _ in 0..count {
                        at += item_len(kind, bytes.get(at..)?, depth - 1)?;
                    }
                    at
                }
            };
            (end <= bytes.len()).then_some(end)
        }
        _ => None,
    }
}

fn fixed_len(kind: u32) -> Option<usize> {
    match kind {
        U8 | I8 | BOOL => Some(1),
        U16 | I16 => Some(2),
        U32 | I32 | F32 => Some(4),
        U64 | I64 | F64 => Some(8),
        _ => None,
    }
}
