//! What crosses rooms: one binary, a module a subject.
