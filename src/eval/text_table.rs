//! Tables as text, in columns where the terminal is wide enough and one row below the other where it is not.

/// The first row is of titles. `left` says which columns begin at their left edge; the first `names` of a row say what it is
/// about. Wider than `width`, each row becomes a heading of these and a line for each of the others.
pub(super) fn table(rows: &[Vec<String>], names: usize, left: &[usize], width: Option<usize>) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widest = |cells: &mut dyn Iterator<Item = &String>| cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(|column| widest(&mut rows.iter().map(|row| &row[column]))).collect();
    let mut text = String::new();
    let pad = |cell: &str, width: usize| " ".repeat(width.saturating_sub(cell.chars().count()));
    if width.is_none_or(|width| widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1) <= width) {
        for row in rows {
            let cells = row.iter().enumerate().map(|(column, cell)| {
                let pad = pad(cell, widths[column]);
                if left.contains(&column) { format!("{cell}{pad}") } else { format!("{pad}{cell}") }
            });
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        return text;
    }
    let Some((titles, rows)) = rows.split_first() else { return text };
    let widest = widest(&mut titles[names..].iter());
    for (number, row) in rows.iter().enumerate() {
        if number > 0 {
            text.push('\n');
        }
        text.push_str(&format!("{}\n", row[..names].join(", ")));
        for (title, cell) in titles[names..].iter().zip(&row[names..]) {
            text.push_str(&format!("  {title}{}  {cell}\n", pad(title, widest)));
        }
    }
    text
}

/// A paragraph in lines of at most `width` characters, but for words that are longer.
pub(super) fn wrapped(paragraph: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return format!("{paragraph}\n") };
    let (mut text, mut used) = (String::new(), 0);
    for word in paragraph.split(' ') {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > width {
            text.push('\n');
            used = 0;
        } else if used > 0 {
            text.push(' ');
            used += 1;
        }
        text.push_str(word);
        used += length;
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_is_wider_than_the_terminal_is_turned() {
        let rows =
            [["run", "arm", "loss", "speed"], ["one", "student", "3.25", "–"], ["other", "control", "3.5", "1,200"]];
        let rows = rows.map(|row| row.map(String::from).to_vec());
        let wide = "run    arm      loss  speed\none    student  3.25      –\nother  control   3.5  1,200\n";
        assert_eq!(table(&rows, 2, &[0, 1], None), wide);
        assert_eq!(table(&rows, 2, &[0, 1], Some(27)), wide);
        let turned = "one, student\n  loss   3.25\n  speed  –\n\nother, control\n  loss   3.5\n  speed  1,200\n";
        assert_eq!(table(&rows, 2, &[0, 1], Some(26)), turned);
        assert_eq!(table(&[], 2, &[], Some(1)), "");
    }

    #[test]
    fn words_stay_whole() {
        assert_eq!(wrapped("one two three four", Some(9)), "one two\nthree\nfour\n");
        assert_eq!(wrapped("incomprehensible as is", Some(5)), "incomprehensible\nas is\n");
        assert_eq!(wrapped("one two", None), "one two\n");
    }
}
