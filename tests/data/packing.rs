use limbeck::data::pack;
use limbeck::targets::{PADDING, PackedSequence};
use proptest::prelude::*;

const PADDING_ID: u32 = 0;

/// The labels of the valid rows, and the tokens that precede them.
fn predictions(sequences: &[PackedSequence]) -> Vec<(u32, u32)> {
    let rows = sequences.iter().flat_map(|sequence| (0..sequence.seq_len()).map(move |row| (sequence, row)));
    rows.filter(|(sequence, row)| sequence.is_valid(*row))
        .map(|(sequence, row)| (sequence.tokens[row], sequence.tokens[row + 1]))
        .collect()
}

proptest! {
    #[test]
    fn each_token_but_a_documents_first_is_the_label_of_exactly_one_row(
        lengths in prop::collection::vec(0usize..40, 0..40),
        seq_len in 1usize..20,
    ) {
        // Every token of all documents is a different number, so that nothing can stand in for anything else.
        let mut next = 1;
        let documents: Vec<Vec<u32>> = lengths
            .iter()
            .map(|&length| {
                let document = (next..next + length as u32).collect();
                next += length as u32;
                document
            })
            .collect();
        let sequences = pack(&documents, seq_len, PADDING_ID);
        let expected: Vec<(u32, u32)> =
            documents.iter().flat_map(|document| document.windows(2).map(|pair| (pair[0], pair[1]))).collect();
        prop_assert_eq!(predictions(&sequences), expected);
        for (number, sequence) in sequences.iter().enumerate() {
            prop_assert_eq!(sequence.tokens.len(), seq_len + 1);
            prop_assert_eq!(sequence.segments.len(), seq_len + 1);
            let used = sequence.segments.iter().take_while(|&&segment| segment != PADDING).count();
            prop_assert!(used == seq_len + 1 || number + 1 == sequences.len(), "padding before the last sequence");
            prop_assert!(sequence.tokens[used..].iter().all(|&token| token == PADDING_ID));
            prop_assert_eq!(sequence.segments[0], 0);
            prop_assert!(sequence.segments[..used].windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] + 1));
        }
    }
}

#[test]
fn a_document_that_ends_at_the_border_is_not_repeated() {
    let sequences = pack(&[vec![1, 2, 3, 4], vec![5, 6, 7, 8]], 3, PADDING_ID);
    assert_eq!(sequences.len(), 2);
    assert_eq!(sequences[0].tokens, [1, 2, 3, 4]);
    assert_eq!(sequences[1].tokens, [5, 6, 7, 8]);
}

#[test]
fn a_document_that_goes_on_repeats_one_token() {
    let sequences = pack(&[vec![1, 2, 3], vec![4, 5, 6, 7]], 3, PADDING_ID);
    assert_eq!(sequences[0].tokens, [1, 2, 3, 4]);
    assert_eq!(sequences[0].segments, [0, 0, 0, 1]);
    assert_eq!(sequences[1].tokens, [4, 5, 6, 7]);
    assert_eq!(sequences[1].segments, [0, 0, 0, 0]);

    let sequences = pack(&[vec![1, 2, 3, 4, 5]], 3, PADDING_ID);
    assert_eq!(sequences[1].tokens, [4, 5, PADDING_ID, PADDING_ID]);
    assert_eq!(sequences[1].segments, [0, 0, PADDING, PADDING]);
}
