//! Three levels of read cache behind one type.
