//! A subscriber that keeps what it is told.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    filter::LevelFilter,
    layer::{Context, Layer, SubscriberExt},
    registry::LookupSpan,
};

type Fields = BTreeMap<String, String>;

#[derive(Clone, Debug)]
pub struct Span {
    pub name: &'static str,
    pub target: &'static str,
    pub level: Level,
    pub parent: Option<&'static str>,
    pub fields: Fields,
    pub is_closed: bool,
}

impl Span {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }
}

/// An event, and the spans that it is in: their names, and the keys of locks.
#[derive(Clone, Debug)]
pub struct Line {
    pub target: &'static str,
    pub fields: Fields,
    pub spans: Vec<String>,
}

#[derive(Default)]
struct Kept {
    spans: BTreeMap<u64, Span>,
    lines: Vec<Line>,
}

/// Clones are the same.
#[derive(Clone, Default)]
pub struct Capture(Arc<Mutex<Kept>>);

impl Capture {
    /// Captures what this thread says from now on.
    pub fn start(level: LevelFilter) -> (Self, DefaultGuard) {
        let capture = Self::default();
        let layer = capture.clone().with_filter(level);
        let subscriber = tracing_subscriber::registry().with(layer);
        (capture, tracing::subscriber::set_default(subscriber))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap()
    }

    /// The spans of locks, in the order in which they began.
    pub fn locks(&self) -> Vec<Span> {
        let kept = self.kept();
        let locks = kept.spans.values().filter(|span| span.name == "lock");
        locks.cloned().collect()
    }

    /// The span of the only lock there was.
    #[track_caller]
    pub fn lock(&self) -> Span {
        let locks = self.locks();
        assert_eq!(locks.len(), 1, "{locks:?}");
        locks[0].clone()
    }

    pub fn lines(&self) -> Vec<Line> {
        self.kept().lines.clone()
    }

    /// Everything, as one text.
    pub fn text(&self) -> String {
        let kept = self.kept();
        format!("{:?}{:?}", kept.spans, kept.lines)
    }
}

struct Collect<'a>(&'a mut Fields);

impl Visit for Collect<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Capture {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let metadata = attributes.metadata();
        let parent = context.span(id).and_then(|span| span.parent());
        let mut fields = Fields::new();
        attributes.record(&mut Collect(&mut fields));
        let number = self.kept().spans.len() as u64;
        let span = Span {
            name: metadata.name(),
            target: metadata.target(),
            level: *metadata.level(),
            parent: parent.map(|parent| parent.name()),
            fields,
            is_closed: false,
        };
        // Ids are used again.
        context.span(id).unwrap().extensions_mut().insert(number);
        self.kept().spans.insert(number, span);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let number = *context.span(id).unwrap().extensions().get().unwrap();
        let mut kept = self.kept();
        values.record(&mut Collect(
            &mut kept.spans.get_mut(&number).unwrap().fields,
        ));
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::new();
        event.record(&mut Collect(&mut fields));
        let scope = context.event_scope(event);
        let names = scope.into_iter().flat_map(|scope| scope.from_root());
        let names: Vec<_> = names
            .map(|span| {
                let number = *span.extensions().get::<u64>().unwrap();
                let kept = self.kept();
                let key = kept.spans[&number].field("key").unwrap_or_default();
                format!("{}:{key}", span.name())
            })
            .collect();
        self.kept().lines.push(Line {
            target: event.metadata().target(),
            fields,
            spans: names,
        });
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let number = *context.span(&id).unwrap().extensions().get().unwrap();
        self.kept().spans.get_mut(&number).unwrap().is_closed = true;
    }
}
